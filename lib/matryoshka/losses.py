"""The training loss: sentence-transformers' own, with what must not be a negative taken out of every query's candidates."""

from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor

from matryoshka.recipe import Recipe

_SCORES_AT_ONCE = 2**25  # of the cached loss


class MaskedScores:
    """Inner products of unit vectors in float32, minus infinity where a document must not count.

    The losses ask for the queries' rows in order, all of them for each dim, at once or some at a time.
    """

    def __init__(self) -> None:
        self._mask = torch.zeros((0, 0), dtype=torch.bool)
        self._row = 0

    def begin(self, mask: Tensor) -> None:
        """Takes the mask of the next batch; [queries of this rank, documents of all ranks]."""
        self._mask, self._row = mask, 0

    def __call__(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Returns the scores of the next queries with all documents.

        Shapes: queries [n, D], documents [C, D] -> [n, C].
        """
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries.float() @ documents.float().T
        mask = self._mask[self._row : self._row + len(queries)]
        self._row = (self._row + len(queries)) % len(self._mask)
        return scores.masked_fill(mask, -torch.inf)


def build(network: Any, recipe: Recipe, scores: MaskedScores, num_ranks: int) -> MatryoshkaLoss:
    """Returns the loss of one rank: the mean of its queries' cross-entropies over the documents of all ranks, summed over dims.

    Documents are gathered with their gradients, so that the ranks' mean gradient is that of one process with all pairs.

    Source: Henderson et al. 2017, arXiv:1705.00652, equation 6; Gao et al. 2021, arXiv:2101.06983 (caching);
    Kusupati et al. 2022, arXiv:2205.13147, equation 1.
    """
    named: dict[str, Any] = {"similarity_fct": scores, "gather_across_devices": num_ranks > 1}
    inner: torch.nn.Module
    if recipe.mini_batch_tokens:
        num_documents = recipe.batch_size * (1 + recipe.num_negatives)
        named |= {"mini_batch_size": max(_SCORES_AT_ONCE // num_documents, 1), "mini_batch_num_tokens": recipe.mini_batch_tokens}
        inner = CachedMultipleNegativesRankingLoss(network, **named)
    else:
        inner = MultipleNegativesRankingLoss(network, **named)
    # Every dim in every step: with a random choice, ranks would draw different ones.
    return MatryoshkaLoss(network, inner, matryoshka_dims=list(recipe.dims), n_dims_per_step=-1)
