"""Coarse spaces: in which few dims the shortlist is made.

A space turns full vectors into short ones whose inner products stand for those of the full ones. The trained prefix needs
nothing but the model; a rotation puts the directions first in which documents differ most; a projection looks at queries too.
Full vectors, and so the scores of reranking, stay what they are in all of them.

Drivers import this room for what an index says of itself: torch is imported where vectors are turned.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from matryoshka.nested import Float32Array, shrink

if TYPE_CHECKING:
    import torch

Kind = Literal["prefix", "rotation", "projection"]
Matrix = npt.NDArray[np.float64]

_TINY = 1e-30  # length of a vector that is taken as zero
_RIDGE = 1e-3  # share of the mean energy that every direction is taken to have at least


@dataclass(frozen=True, slots=True)
class Space:
    """A coarse space.

    Attributes:
        kind: ``prefix``, ``rotation`` or ``projection``.
        dim: Of coarse vectors.
        document_map: From full to coarse vectors of documents; None: the prefix is cut and brought to unit length.
        query_map: The same for queries.

    Shapes: document_map [D, dim], query_map [D, dim].
    """

    kind: Kind
    dim: int
    document_map: Float32Array | None = None
    query_map: Float32Array | None = None

    def documents(self, vectors: npt.NDArray[np.floating[Any]]) -> Float32Array:
        """Returns the coarse vectors of documents.

        Shapes: vectors [N, D] -> [N, dim].
        """
        return _apply(self.document_map, vectors, self.dim)

    def queries(self, vectors: npt.NDArray[np.floating[Any]]) -> Float32Array:
        """Returns the coarse vectors of queries.

        Shapes: vectors [Q, D] -> [Q, dim].
        """
        return _apply(self.query_map, vectors, self.dim)

    def write(self, path: Path) -> None:
        """Writes the space to a file that holds nothing but numbers."""
        maps: dict[str, Any] = {"documents": self.document_map, "queries": self.query_map}
        known = {name: own for name, own in maps.items() if own is not None}
        with path.open("wb") as file:
            np.savez(file, kind=np.array(self.kind), dim=np.array(self.dim), **known)

    @classmethod
    def read(cls, path: Path) -> "Space":
        """Returns the space in a file; the caller has checked the file's digest."""
        with np.load(path, allow_pickle=False) as found:
            kind: Any = str(found["kind"])
            return cls(kind, int(found["dim"]), found.get("documents"), found.get("queries"))


def learn(
    kind: Kind,
    dim: int,
    documents: npt.NDArray[np.floating[Any]],
    queries: npt.NDArray[np.floating[Any]] | None = None,
) -> Space:
    """Returns a space learned from samples; a prefix needs none.

    Shapes: documents [N, D], queries [Q, D].

    Raises:
        ValueError: A projection without queries, or fewer documents than dims.
    """
    if kind == "prefix":
        return Space(kind, dim)
    if len(documents) < dim:
        raise ValueError(f"--space {kind}: {len(documents)} documents, too few for {dim} dims. Choose prefix, or fewer.")
    energy = _second_moment(documents)
    if kind == "rotation":
        _, directions = np.linalg.eigh(energy)
        leading = np.ascontiguousarray(directions[:, ::-1][:, :dim], dtype=np.float32)
        return Space(kind, dim, leading, leading)
    if queries is None or not len(queries):
        raise ValueError("--space projection: needs queries to learn from. Pass --queries, or choose rotation.")
    return _project(dim, energy, _second_moment(queries))


def _project(dim: int, documents: Matrix, queries: Matrix) -> Space:
    """Returns the maps that keep inner products best: of all products of two maps of this rank, they err least on average.

    The mean squared error of q (A B^T) x over independent q and x is |Cq^1/2 (I - A B^T) Cx^1/2| in the Frobenius norm, so the
    best A B^T comes from the leading singular vectors of Cq^1/2 Cx^1/2 (Eckart and Young 1936). The singular values are left
    with the documents' side, whose vectors then keep the proportions that clustering and quantising look at.
    """
    query_root, document_root = _root(queries), _root(documents)
    left, strengths, right = np.linalg.svd(query_root @ document_root)
    document_map = np.linalg.solve(document_root, right[:dim].T) * strengths[:dim]
    query_map = np.linalg.solve(query_root, left[:, :dim])
    # Any factor may move from one side to the other: documents get the length that they have in these directions.
    lengths = np.sqrt(np.einsum("dk,de,ek->k", document_map, documents, document_map))
    scale = np.sqrt(strengths[:dim]) / lengths
    return Space("projection", dim, (document_map * scale).astype(np.float32), (query_map / scale).astype(np.float32))


def _second_moment(vectors: npt.NDArray[np.floating[Any]]) -> Matrix:
    """Returns the mean outer product of vectors, a little of it spread over all directions.

    Shapes: vectors [N, D] -> [D, D].
    """
    wide, scales = _widen(vectors)
    unit = wide.mul_(scales)
    moment = (unit.T @ unit).double().numpy() / max(len(unit), 1)
    ridge = _RIDGE * np.trace(moment) / len(moment)
    spread: Matrix = moment + ridge * np.eye(len(moment))
    return spread


def _root(moment: Matrix) -> Matrix:
    """Returns the symmetric square root."""
    values, directions = np.linalg.eigh(moment)
    root: Matrix = (directions * np.sqrt(values)) @ directions.T
    return root


def _apply(own: Float32Array | None, vectors: npt.NDArray[np.floating[Any]], dim: int) -> Float32Array:
    """Returns coarse vectors: prefixes at unit length, or what a map makes of vectors of unit length."""
    if own is None:
        return shrink(vectors, dim)
    import torch

    wide, scales = _widen(vectors)
    mapped: Float32Array = (wide @ torch.from_numpy(own)).mul_(scales).numpy()
    return mapped


def _widen(vectors: npt.NDArray[np.floating[Any]]) -> "tuple[torch.Tensor, torch.Tensor]":
    """Returns vectors as float32, and what each is multiplied with to have unit length.

    Shapes: vectors [N, D] -> [N, D], [N, 1].
    """
    import torch

    wide = torch.from_numpy(np.array(vectors)).float()  # a copy that torch may write to, or it warns
    return wide, torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(_TINY).reciprocal_()
