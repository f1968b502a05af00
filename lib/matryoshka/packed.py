"""Forward passes without padding: documents lie end to end, and attention stays within each of them.

The model's own code runs unchanged but for its attention, which transformers lets one replace by name. On CUDA that is one
variable-length kernel; elsewhere documents of like length are attended to together. All else can be compiled into one program.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._inductor import config as inductor
from transformers import AttentionInterface

Attention = Literal["varlen", "grouped"]

# Families whose attention can be replaced, and where their positions start (RoBERTa's kin: after the padding index).
FIRST_POSITIONS = {
    "bert": 0,
    "camembert": 2,
    "distilbert": 0,
    "electra": 0,
    "modernbert": 0,
    "mpnet": 2,
    "qwen3": 0,
    "roberta": 2,
    "xlm-roberta": 2,
}

_TILE = 16  # lengths within attention are rounded up to this; CPU kernels run twice as fast on whole tiles [measured, AMX]

# The stream is filled up to a multiple of this: libraries keep a kernel for every shape of a product that they meet.
_STREAM_TILE = 64


class CannotPackError(Exception):
    """A model cannot run packed; the text says why."""


@dataclass(frozen=True, slots=True)
class Group:
    """Documents whose lengths round up to the same number of tiles: one batch of attention.

    Attributes:
        num_documents: n.
        length: P, their rounded length.
        is_real: Which of the n x P places hold a token; None where all do.
    """

    num_documents: int
    length: int
    is_real: Tensor | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the documents of one step lie in its stream of T tokens.

    Attributes:
        bounds: First token of each document, and T; int32, [N + 1].
        max_length: Tokens of the longest.
        num_tokens: T without what fills the stream up.
        groups: For grouped attention, in the order of the stream.
        spread: For each place of all groups, the token that stands there; [sum of n x P]. None where it is its own number.
        collect: For each token, its place; [T]. None where it is its own number.
        masks: What layers of this step share, by group and window.
    """

    bounds: Tensor
    max_length: int
    num_tokens: int
    groups: tuple[Group, ...] = ()
    spread: Tensor | None = None
    collect: Tensor | None = None
    masks: dict[Any, Tensor | None] = field(default_factory=dict)


def group_documents(
    lengths: npt.NDArray[np.int64], length: int, device: str
) -> tuple[tuple[Group, ...], Tensor | None, Tensor | None]:
    """Returns (groups, spread, collect) of documents that lie end to end, longest first; see ``Layout``.

    Args:
        lengths: Tokens of each document; [N].
        length: Tokens of the stream, which is filled up behind the documents.
        device: Where tensors go.
    """
    starts = np.cumsum(lengths) - lengths
    rounded = -(-lengths // _TILE) * _TILE
    edges = [0, *(np.flatnonzero(np.diff(rounded)) + 1).tolist(), len(lengths)]
    groups, spread, collect, num_places = [], [], [], 0
    for first, last in itertools.pairwise(edges):
        places = np.arange(rounded[first])
        is_real = places < lengths[first:last, None]  # [n, P]
        spread.append((starts[first:last, None] + np.where(is_real, places, 0)).ravel())
        collect.append(num_places + np.flatnonzero(is_real))
        num_places += is_real.size
        mask = None if is_real.all() else torch.from_numpy(is_real).to(device)
        groups.append(Group(int(last - first), int(rounded[first]), mask))
    if num_places == length and all(group.is_real is None for group in groups):
        return tuple(groups), None, None
    collect.append(np.zeros(length - lengths.sum(), np.int64))
    return (
        tuple(groups),
        torch.from_numpy(np.concatenate(spread)).to(device),
        torch.from_numpy(np.concatenate(collect)).to(device),
    )


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns attention within each document, group by group.

    Shapes: query [1, H, T, d]; key, value [1, H or fewer, T, d]; bias [1, H, P, P] or larger; result [1, T, H, d].
    """
    # One row per place: T tokens become sum(n x P) places, in which every group is a block of equal lengths.
    sizes = [group.num_documents * group.length for group in layout.groups]
    q, k, v = (torch.split(_spread(part[0].transpose(0, 1), layout), sizes) for part in (query, key, value))
    is_causal = bool(getattr(module, "is_causal", False))
    parts = []
    for number, group in enumerate(layout.groups):
        shape = (group.num_documents, group.length, -1, query.shape[3])
        own_q, own_k, own_v = (part[number].view(shape).transpose(1, 2) for part in (q, k, v))  # [n, H, P, d]
        mask = _mask(layout, number, sliding_window, is_causal, bias)
        named: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal and mask is None, "scale": scaling}
        if _is_slow_backwards(own_q, own_k, mask, dropout):
            attended = _apply(_CpuAttention, own_q, own_k, own_v, *named.values())
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(
                own_q, own_k, own_v, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1], **named
            )
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return _collect(torch.cat(parts), layout).unsqueeze(0), None


def _spread(tokens: Tensor, layout: Layout) -> Tensor:
    """Returns the rows of all places, given those of all tokens."""
    if layout.spread is None or layout.collect is None:
        return tokens
    return _apply(_Spread, tokens, layout.spread, layout.collect, layout.num_tokens)


def _collect(places: Tensor, layout: Layout) -> Tensor:
    """Returns the rows of all tokens, given those of all places."""
    if layout.spread is None or layout.collect is None:
        return places
    return _apply(_Collect, places, layout.spread, layout.collect, layout.num_tokens)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    """Rows of tokens to rows of places. A place of padding has no gradient, and every token but the filling has one place.

    So the gradient is a gather as well; torch's own would add row after row on one thread.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, spread: Tensor, collect: Tensor, num_tokens: int) -> Tensor:
        ctx.collect, ctx.num_tokens = collect, num_tokens
        return tokens.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _zero_behind(gradients[0].index_select(0, ctx.collect), ctx.num_tokens), None, None, None


class _Collect(torch.autograd.Function):
    """Rows of places to rows of tokens; see ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, spread: Tensor, collect: Tensor, num_tokens: int) -> Tensor:
        ctx.spread, ctx.collect, ctx.num_tokens = spread, collect, num_tokens
        return places.index_select(0, collect)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # Padding reads a token that has a place of its own, and so has to be told from it.
        padding = torch.ones(len(ctx.spread), dtype=torch.bool, device=ctx.spread.device)
        padding[ctx.collect[: ctx.num_tokens]] = False
        rows = gradients[0].index_select(0, ctx.spread)
        return rows.masked_fill_(padding[:, None, None], 0), None, None, None


def _is_slow_backwards(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Returns whether torch's own gradient of attention would be taken in half precision on a CPU.

    A mask that is trained (MPNet's relative positions) needs torch's own, which has a gradient for it.
    """
    is_half = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    is_trained = torch.is_grad_enabled() and query.requires_grad
    is_plain = not dropout and query.shape[1] == key.shape[1] and not (mask is not None and mask.requires_grad)
    return is_half and is_trained and is_plain


class _CpuAttention(torch.autograd.Function):
    """Attention whose gradient is computed in float32: on CPUs the kernel for bf16 takes twice as long [measured, AMX]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        own = None if mask is None else mask.to(query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attended, log_sums = kernel(query, key, value, 0.0, is_causal, attn_mask=own, scale=scale)
        ctx.save_for_backward(query, key, value, attended, log_sums, mask)
        ctx.named = {"is_causal": is_causal, "scale": scale}
        return cast("Tensor", attended)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, log_sums, mask = ctx.saved_tensors
        wide = [part.float() for part in (gradients[0], query, key, value, attended)]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = kernel(*wide, log_sums, 0.0, attn_mask=mask, **ctx.named)
        return (*(part.to(query.dtype) for part in found), None, None, None)


def _zero_behind(rows: Tensor, num_rows: int) -> Tensor:
    rows[num_rows:] = 0
    return rows


def _mask(layout: Layout, number: int, window: int | None, is_causal: bool, bias: Tensor | None) -> Tensor | None:
    """Returns what a group's attention must leave out or add: [n, 1 or H, P, P], or None.

    Padding stands after a document, so that a causal mask hides it as well.
    """
    key = (number, window)
    if key not in layout.masks:
        group, allowed = layout.groups[number], None
        device = layout.bounds.device
        if window is not None and window < group.length:
            places = torch.arange(group.length, device=device)
            distance = places[:, None] - places[None, :]
            allowed = ((distance.abs() < window) & ((distance >= 0) | (not is_causal)))[None, None]
        if group.is_real is not None and not (is_causal and allowed is None):
            real = group.is_real[:, None, None, :].expand(-1, 1, group.length, -1)
            # A row of padding would otherwise see nothing at all, and softmax over nothing is not a number.
            allowed = real if allowed is None else (real & allowed) | ~group.is_real[:, None, :, None]
        layout.masks[key] = allowed
        if bias is not None:
            own = bias[..., : group.length, : group.length]
            layout.masks[key] = own if allowed is None else own.masked_fill(~allowed, float("-inf"))
    return layout.masks[key]


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns attention within each document by torch's variable-length kernel (CUDA, half precision).

    Shapes: as ``grouped_attention``.
    """
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if sliding_window is None else sliding_window - 1
    half = value.dtype  # some families turn queries and keys in float32, which autocast leaves as they are
    q, k, v = (part[0].transpose(0, 1).to(half) for part in (query, key, value))  # [T, H, d]
    shared: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    window = (reach, 0 if getattr(module, "is_causal", False) else reach)
    ends = (layout.bounds, layout.bounds, layout.max_length, layout.max_length)
    attended = varlen_attn(q, k, v, *ends, scale=scaling, window_size=window, **shared)
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0), None


_FUNCTIONS: dict[str, Callable[..., Any]] = {"varlen": varlen_attention, "grouped": grouped_attention}


class _Step(threading.local):
    """The step that a thread computes, for attention that cannot be handed its layout."""

    layout: Layout | None = None
    attention: Attention = "grouped"


_at_hand = _Step()


@torch.library.custom_op("matryoshka::packed_attention", mutates_args=())
def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None, is_causal: bool
) -> Tensor:
    """Attention as one operation that the compiler does not look into: every step has another layout, and one program."""
    named = {"layout": _at_hand.layout, "scaling": scaling, "sliding_window": sliding_window}
    attended, _ = _FUNCTIONS[_at_hand.attention](SimpleNamespace(is_causal=is_causal), query, key, value, None, **named)
    return cast("Tensor", attended.contiguous())


@_packed_attention.register_fake
def _(query: Tensor, _key: Tensor, _value: Tensor, _scaling: Any, _sliding_window: Any, _is_causal: Any) -> Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))


def _compiled_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stands where the compiled program calls attention.

    Shapes: as ``grouped_attention``.
    """
    return _packed_attention(query, key, value, scaling, sliding_window, bool(getattr(module, "is_causal", False))), None


class PackedModel:
    """A sentence-transformers model whose transformer runs on documents laid end to end.

    Args:
        model: Its first module is the transformer; the modules after it (pooling, dense, normalise) run as they are.
        attention: ``varlen`` or ``grouped``.
        is_compiled: Whether the transformer is compiled (by the first call, which takes a while): its products take
            weights in the order that they like best, and what lies between two products is one pass over memory.

    Raises:
        CannotPackError: The model is of a family whose attention cannot be replaced or compiled, or pools in an unknown way.
    """

    def __init__(self, model: Any, attention: Attention, *, is_compiled: bool = False) -> None:
        self._network, self._tail = _take_apart(model)
        family = self._network.config.model_type
        self._attention = attention
        self.first_position = FIRST_POSITIONS[family]
        self._name = f"matryoshka_{attention}"
        self._is_adapted = family == "mpnet"
        if self._is_adapted:
            if attention != "grouped":
                raise CannotPackError("its relative positions need grouped attention")
            if is_compiled:
                raise CannotPackError("the attention of its family is not replaced by name")
            _adapt_mpnet(self._network)
        self._program: Any = None
        if is_compiled:
            self._name = "matryoshka_compiled"
            # Any number of tokens, one program, and no part beside it.
            # The compiler's own processes would stand beside every worker of a machine.
            self._program = torch.compile(self._network, fullgraph=True, dynamic=True, options={"compile_threads": 1})
        AttentionInterface.register(self._name, _compiled_attention if is_compiled else _FUNCTIONS[attention])

    def length_of(self, num_tokens: int) -> int:
        """Returns how many tokens go through the model for a step of so many."""
        return num_tokens if self._attention == "varlen" else -(-num_tokens // _STREAM_TILE) * _STREAM_TILE

    def __call__(
        self, ids: Tensor, positions: Tensor, owners: Tensor, bounds: Tensor, lengths: npt.NDArray[np.int64], extras: Any
    ) -> Tensor:
        """Returns the pooled vectors of documents that lie end to end, longest first.

        Args:
            ids: Token ids; [T].
            positions: Of each token in its document, counted from ``first_position``; [T].
            owners: Number of each token's document; [T].
            bounds: First token of each document, and T; int32, [N + 1].
            lengths: Tokens of each document, on the host; [N].
            extras: Further features for the modules after the transformer.

        Shapes: result [N, D].
        """
        num_tokens = len(ids)
        if self._attention == "grouped":
            filling = (0, self.length_of(num_tokens) - num_tokens)
            ids = torch.nn.functional.pad(ids, filling)
            positions = torch.nn.functional.pad(positions, filling, value=self.first_position)
            layout = Layout(bounds, int(lengths[0]), num_tokens, *group_documents(lengths, len(ids), str(ids.device)))
        else:
            layout = Layout(bounds, int(lengths[0]), num_tokens)
        _at_hand.layout, _at_hand.attention = layout, self._attention
        own = getattr(self._network.config, "_attn_implementation", None)
        self._network.set_attn_implementation(own if self._is_adapted else self._name)
        try:
            if self._program is not None:
                with inductor.patch(freezing=not ids.is_cuda):  # lets products on a CPU keep their weights in blocks
                    hidden = self._program(input_ids=ids[None], position_ids=positions[None])[0]
            else:
                hidden = self._network(input_ids=ids[None], position_ids=positions[None], layout=layout)[0]
        finally:
            _at_hand.layout = None
            self._network.set_attn_implementation(own)
        features = {"token_embeddings": hidden[:, :num_tokens], "cu_seq_lens_q": bounds, "seq_idx": owners[None], **extras}
        for module in self._tail:
            features = module(features)
        pooled: Tensor = features["sentence_embedding"]
        return pooled


def _take_apart(model: Any) -> tuple[Any, list[Any]]:
    """Returns the transformer of a model, and the modules after it."""
    first, *tail = model
    network = getattr(first, "auto_model", None)
    family = getattr(getattr(network, "config", None), "model_type", type(first).__name__)
    if network is None or family not in FIRST_POSITIONS:
        raise CannotPackError(f"models of type '{family}' are not known to pack")
    if not tail or not hasattr(tail[0], "pooling_mode"):
        raise CannotPackError("its second module does not pool")
    return network, tail


def _adapt_mpnet(network: Any) -> None:
    """Gives MPNet, which does not let its attention be replaced by name, grouped attention with its relative positions."""

    def position_bias(own: Callable[..., Tensor], hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        at_hand = _at_hand.layout
        if at_hand is None:
            return own(hidden, *arguments, **named)
        return own(hidden.new_empty((1, max(group.length for group in at_hand.groups), 0)), *arguments, **named)

    def attend(own: Callable[..., Any], module: Any, hidden: Tensor, mask: Any = None, bias: Any = None, **named: Any) -> Any:
        at_hand = _at_hand.layout
        if at_hand is None:
            return own(hidden, mask, bias, **named)
        shape = (*hidden.shape[:-1], -1, module.attention_head_size)
        q, k, v = (projection(hidden).view(shape).transpose(1, 2) for projection in (module.q, module.k, module.v))
        dropout = module.dropout.p if module.training else 0.0
        attended, _ = grouped_attention(module, q, k, v, None, layout=at_hand, bias=bias, dropout=dropout)
        return (module.o(attended.flatten(2)),)

    encoder = network.encoder
    encoder.compute_position_bias = functools.partial(position_bias, encoder.compute_position_bias)
    for layer in encoder.layer:
        module = layer.attention.attn
        module.forward = functools.partial(attend, module.forward, module)
