"""What a model makes of a sample of texts: its vectors, and the hidden states of every layer, as one vector per text."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from matryoshka import model, training
from matryoshka.anatomy import Sample, Vectors
from matryoshka.encode import Encoder
from matryoshka.nested import Float32Array
from matryoshka.rates import Precision
from matryoshka.storage import Place
from matryoshka.stream import end_of_step
from matryoshka.weights import EMBEDDINGS, HEAD

_TOKENS_PER_STEP = 4_096


def study(
    folder: Place, device: str, precision: Precision, sample: Sample, num_documents: int, max_tokens: int
) -> tuple[Vectors, dict[str, Float32Array]]:
    """Returns the vectors of a sample, and the states of its first documents in every layer.

    Args:
        folder: Of the model.
        device: ``cpu`` or ``cuda``.
        precision: Of the vectors; states are computed in float32.
        sample: The texts.
        num_documents: Of how many documents states are wanted; 0: of none.
        max_tokens: As ``read_states``.
    """
    model.quieten()
    vectors = _encode(folder, device, precision, sample)  # that model is gone when the next one is loaded
    return vectors, read_states(folder, device, sample.documents[:num_documents], max_tokens) if num_documents else {}


def _encode(folder: Place, device: str, precision: Precision, sample: Sample) -> Vectors:
    """Returns the vectors of a sample; documents that are also answers are encoded once."""
    texts = list(dict.fromkeys([*sample.documents, *sample.positives]))
    place = {text: row for row, text in enumerate(texts)}
    with contextlib.closing(Encoder(folder, device, precision)) as encoder:
        vectors = encoder.encode(texts, "document").vectors
        queries = encoder.encode(list(sample.queries), "query").vectors if sample.queries else vectors[:0]
    documents, positives = (vectors[[place[text] for text in own]] for own in (sample.documents, sample.positives))
    return Vectors(documents, queries, positives)


def read_states(folder: Place, device: str, texts: Sequence[str], max_tokens: int) -> dict[str, Float32Array]:
    """Returns one vector per text from every layer, the mean of its tokens' hidden states; and from the head, the model's own.

    The network runs as transformers wrote it, padded: the packed path does not give hidden states away.

    Args:
        folder: Of the model.
        device: ``cpu`` or ``cuda``.
        texts: Documents.
        max_tokens: Longer texts are cut here, or at the model's window.

    Shapes: of each layer [N, D].

    Raises:
        ValueError: The model has no transformer.
    """
    network: Any = model.load(folder, device).eval()
    if not hasattr(network[0], "auto_model"):
        raise ValueError(f"{folder}: has no transformer, so no layers to look at. Pass --layer-documents 0.")
    tokens = training.make_tokeniser(network, max_tokens)(list(texts), "document")
    extras = model.prompt_extras(network, network.prompts.get("document"))
    order = np.argsort(-tokens.lengths, kind="stable")
    edges = np.concatenate([[0], np.cumsum(tokens.lengths)])
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for rows in _steps(order, tokens.lengths):
        ids, mask = _pad([tokens.ids[edges[row] : edges[row + 1]] for row in rows], network.tokenizer.pad_token_id or 0, device)
        for layer, states in _forward(network, ids, mask, extras).items():
            parts.setdefault(layer, []).append(states.float().cpu().numpy())
    back = np.argsort(order)
    return {layer: np.concatenate(own)[back] for layer, own in parts.items()}


def _steps(order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the texts of each step, the longest first."""
    ordered, start = lengths[order], 0
    while start < len(order):
        stop = end_of_step(ordered, start, _TOKENS_PER_STEP, is_padded=True)
        yield order[start:stop]
        start = stop


def _pad(texts: Sequence[npt.NDArray[np.int32]], filling: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask.

    Shapes: both [n, longest].
    """
    lengths = torch.tensor([len(own) for own in texts], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    ids = torch.full(mask.shape, filling, device=device)
    ids[mask] = torch.from_numpy(np.concatenate(texts)).long().to(device)
    return ids, mask


def _forward(network: Any, ids: Tensor, mask: Tensor, extras: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the mean state of each text in every layer, and its vector.

    Shapes: of each layer [n, D].
    """
    with torch.inference_mode():
        output = network[0].auto_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        features: dict[str, Any] = {"token_embeddings": output[0], "attention_mask": mask.long(), **extras}
        for module in list(network)[1:]:
            features = module(features)
        weights = mask / mask.sum(dim=1, keepdim=True)  # [n, longest]
        means = [torch.einsum("nt,ntd->nd", weights, states) for states in output.hidden_states]
    names = [EMBEDDINGS, *(f"layer {number}" for number in range(len(means) - 1))]
    return {**dict(zip(names, means, strict=True)), HEAD: features["sentence_embedding"]}
