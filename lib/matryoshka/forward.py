"""Forward passes of training: the texts of a batch packed under a token budget, as the encoder packs them, with gradients."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from matryoshka.packed import CannotPackError, PackedModel
from matryoshka.rates import Precision
from matryoshka.stream import Stream, end_of_step, put

# Tokens of a forward pass. CPU: larger ones fall out of the caches [measured, AMX].
TOKENS_PER_STEP = {"cpu": 4_096, "cuda": 65_536}

_CHECK_LENGTHS = (40, 17, 16, 5)
_EXTRAS = ("prompt_length",)
_TOLERANCE = 1e-4  # of unit vectors in float32


def features_of(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], extras: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Returns texts as sentence-transformers hands flattened ones to its modules, and their lengths on the host.

    Args:
        ids: Tokens of all texts.
        lengths: Of these texts.
        extras: See ``model.prompt_extras``.

    Shapes: ids [T], lengths [N] -> input_ids [1, T], cu_seq_lens_q [N + 1].
    """
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "input_ids": torch.from_numpy(ids)[None].long(),
        "cu_seq_lens_q": torch.from_numpy(edges).to(torch.int32),
        "lengths": lengths,
        **(extras or {}),
    }


def _extras_of(features: Mapping[str, Any]) -> dict[str, Any]:
    return {name: features[name] for name in _EXTRAS if name in features}


class TrainingForward:
    """Stands in place of a model's ``forward`` while it is trained.

    Args:
        network: The model; its ``forward`` is replaced until ``restore``.
        precision: With bf16 on a GPU, the variable-length kernel is used, unless attention has dropout, which it has not.

    Attributes:
        notice: Why texts are padded; empty where they are packed.
    """

    def __init__(self, network: Any, precision: Precision) -> None:
        self._network, self._device = network, network.device
        self._budget = TOKENS_PER_STEP[self._device.type]
        self._padded = type(network).forward
        self._packed: PackedModel | None = None
        self.notice = ""
        try:
            self._packed = self._checked(precision)
        except CannotPackError as error:
            self.notice = f"batches are padded: {error}"
        network.forward = self

    def restore(self) -> None:
        """Gives the model its own ``forward`` back."""
        del self._network.forward

    def _checked(self, precision: Precision) -> PackedModel:
        """Returns the packed model, if a few documents have the vectors that they have when padded."""
        is_training = self._network.training
        self._network.eval()
        lengths = np.minimum(_CHECK_LENGTHS, self._network.max_seq_length or max(_CHECK_LENGTHS))
        count = int(self._network.tokenizer.vocab_size)
        ids = np.random.default_rng(0).integers(count // 2, count, lengths.sum(), dtype=np.int32)
        features = features_of(ids, lengths)
        features["input_ids"] = features["input_ids"].to(self._device)
        packed = PackedModel(self._network, "grouped")
        with torch.no_grad():
            found, wanted = self._run(packed, features), self._run_padded(features)["sentence_embedding"]
        self._network.train(is_training)
        apart = float((normalize(found) - normalize(wanted)).abs().max())
        if not apart < _TOLERANCE:
            raise CannotPackError(f"packed vectors differ from padded ones by {apart:.1e}")
        return self._varlen() if self._device.type == "cuda" and precision == "bf16" else packed

    def _varlen(self) -> PackedModel:
        """Returns the model with the variable-length kernel; grouped, where its family or its dropout does not allow that."""
        if _attention_dropout(self._network):
            return PackedModel(self._network, "grouped")
        try:
            return PackedModel(self._network, "varlen")
        except CannotPackError:
            return PackedModel(self._network, "grouped")

    def __call__(self, features: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Returns the features with the vectors of the texts, in their order.

        Shapes: as ``features_of``; sentence_embedding [N, D].
        """
        if "cu_seq_lens_q" not in features:
            found: dict[str, Any] = self._padded(self._network, dict(features))
            return found
        if self._packed is None:
            return self._run_padded(features)
        return {**features, "sentence_embedding": self._run(self._packed, features)}

    def _run(self, packed: PackedModel, features: Mapping[str, Any]) -> Tensor:
        lengths = _lengths_of(features)
        order = np.argsort(-lengths, kind="stable")
        stream = Stream.of(features["input_ids"][0], lengths, order, packed.first_position, self._device.type)
        pooled, start = [], 0
        while start < len(order):
            stop = end_of_step(stream.lengths, start, self._budget)
            step = stream.step(start, stop)
            pooled.append(packed(step.ids, step.positions, step.owners, step.bounds, step.lengths, _extras_of(features)))
            start = stop
        return torch.cat(pooled).index_select(0, put(np.argsort(order), self._device))

    def _run_padded(self, features: Mapping[str, Any]) -> dict[str, Any]:
        lengths = torch.from_numpy(_lengths_of(features)).to(self._device)
        mask = torch.arange(int(lengths.max()), device=self._device) < lengths[:, None]  # [N, longest]
        ids = torch.full(mask.shape, self._network.tokenizer.pad_token_id or 0, device=self._device)
        ids[mask] = features["input_ids"][0]
        found: dict[str, Any] = self._padded(
            self._network, {"input_ids": ids, "attention_mask": mask.long(), **_extras_of(features)}
        )
        return found


def _attention_dropout(network: Any) -> float:
    """Returns the rate in a model's attention, whatever its family calls it."""
    config = network[0].auto_model.config
    return max(float(getattr(config, name, None) or 0) for name in ("attention_probs_dropout_prob", "attention_dropout"))


def _lengths_of(features: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Returns the lengths of the texts; of a part of a batch, they are read from the device."""
    lengths: npt.NDArray[np.int64] = features["lengths"]
    if len(lengths) != len(features["cu_seq_lens_q"]) - 1:
        lengths = np.diff(features["cu_seq_lens_q"].cpu().numpy()).astype(np.int64)
    return lengths
