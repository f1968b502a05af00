"""Loops over candidates that numpy and torch have no call for, compiled for this processor. The one door for numba.

Scores of matrix products come here as the bits of bfloat16 (int16) or float32 (int32), and are compared as integers that have
the order of the floats: that is faster. A bar is such an integer: what is below it cannot be among the best. The lowest one
lets everything pass.

A note is an int64: above, the place of a score in this order; in the lower half, the row of the document. So notes have the
order of scores.

Stored vectors come as arrays that may not be written to: float16 as uint16, bfloat16 as int16 (their bits), int8 as it is.

Nothing here holds the interpreter's lock, so that threads run side by side.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from matryoshka.topk import IntArray

F = TypeVar("F", bound=Callable[..., Any])
Bits = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float32]

BLOCK = 64  # columns that are compared with a bar at once

_ROW = (1 << 32) - 1


def _compiled(**options: Any) -> Callable[[F], F]:
    """Returns a decorator that compiles on the first call; kept on disk for the next process where there is a place for it."""

    def compile_it(function: F) -> F:
        try:
            made: F = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the source's folder nor the user's can be written to
            made = njit(nogil=True, **options)(function)
        return made

    return compile_it


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what compiled code may call: the function says what is generated for arguments of some types."""
    made: Callable[..., Any] = intrinsic(function)
    return made


# The order in which a sum is taken is left to the compiler, once for all calls: a score depends on its two vectors alone.
_SUMS = {"fastmath": {"reassoc", "contract"}}


@_instruction
def _widen(_context: Any, number: Any) -> Any:
    """Returns a component of a stored vector as float32: of uint16 and int16 the bits, of int8 the number."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,), wide = arguments, ir.FloatType()
        if signature.args[0] == types.uint16:
            # Exponent and mantissa in their places, and the exponent's bias made good: not every processor knows halves.
            whole = ir.IntType(32)
            number = builder.zext(bits, whole)
            size = builder.shl(builder.and_(number, ir.Constant(whole, 0x7FFF)), ir.Constant(whole, 13))
            sign = builder.shl(builder.and_(number, ir.Constant(whole, 0x8000)), ir.Constant(whole, 16))
            scaled = builder.fmul(builder.bitcast(size, wide), ir.Constant(wide, 2.0**112))
            return builder.bitcast(builder.or_(builder.bitcast(scaled, whole), sign), wide)
        if signature.args[0] == types.int16:
            return builder.bitcast(builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), wide)
        return builder.sitofp(bits, wide)

    return types.float32(number), generate


def _ordered(builder: Any, bits: Any, kind: Any) -> Any:
    """Generates the integers that have the order of floats with these bits, and back: of negative ones all but the sign flips."""
    number = kind.element if isinstance(kind, ir.VectorType) else kind

    def constant(value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)

    is_negative = builder.ashr(bits, constant(number.width - 1))
    return builder.xor(bits, builder.and_(is_negative, constant((1 << (number.width - 1)) - 1)))


@_instruction
def _order_of(_context: Any, bits: Any) -> Any:
    """Returns the place of a float in the order, given its bits."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _ordered(builder, arguments[0], ir.IntType(signature.args[0].bitwidth))

    return bits(bits), generate


@_instruction
def _as_float(_context: Any, _order: Any, like: Any) -> Any:
    """Returns the float32 at a place, an int64, in the order of numbers of the type of ``like``."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, kind = ir.IntType(32), ir.IntType(signature.args[1].bitwidth)
        bits = _ordered(builder, builder.trunc(arguments[0], kind), kind)
        if kind.width < whole.width:
            bits = builder.shl(builder.zext(bits, whole), ir.Constant(whole, whole.width - kind.width))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int64, like), generate


@_instruction
def _as_order(_context: Any, _number: Any, like: Any) -> Any:
    """Returns the place of a float32 in the order of numbers of the type of ``like``; of one between two, the lower one's."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, kind = ir.IntType(32), ir.IntType(signature.args[1].bitwidth)
        order = _ordered(builder, builder.bitcast(arguments[0], whole), whole)
        lower = builder.ashr(order, ir.Constant(whole, whole.width - kind.width))
        return builder.trunc(lower, kind) if kind.width < whole.width else lower

    return like(types.float32, like), generate


@_instruction
def _reached(_context: Any, numbers: Any, _start: Any, _bar: Any) -> Any:
    """Returns which of ``BLOCK`` scores from a start reach the bar, as the bits of an uint64, the first one lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        number = ir.IntType(signature.args[2].bitwidth)
        several = ir.VectorType(number, BLOCK)
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), several.as_pointer())
        block = builder.load(place, align=number.width // 8, typ=several)
        once = builder.insert_element(ir.Constant(several, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)
        bars = builder.shuffle_vector(once, ir.Constant(several, ir.Undefined), everywhere)
        return builder.bitcast(builder.icmp_signed(">=", _ordered(builder, block, several), bars), ir.IntType(BLOCK))

    return types.uint64(numbers, types.int64, numbers.dtype), generate


@_instruction
def _first_one(_context: Any, _bits: Any) -> Any:
    """Returns the place of the lowest bit that is set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@_compiled()
def note(
    products: Bits,
    num_columns: int,
    first_row: int,
    allowed: npt.NDArray[np.bool_],
    num_kept: int,
    margins: Floats,
    share: float,
    bars: Bits,
    counts: IntArray,
    limits: IntArray,
    notes: IntArray,
    start: int,
) -> int:
    """Notes, query by query, the columns of a product that reach the bar; bars rise as better ones come.

    Args:
        products: Scores; the number of columns is a multiple of ``BLOCK``.
        num_columns: How many of them are documents.
        first_row: Row of the first one.
        allowed: Which columns may be found; empty: all.
        num_kept: How many of the best are wanted.
        margins: By how much a document may score less than the last of the best, so far, and still be one in truth.
        share: The same as a share of that score.
        bars: Per query, changed.
        counts: How many are noted, changed.
        limits: At how many those are dropped that cannot be among the best any more, changed; above ``num_kept``.
        notes: What is noted, in no order, changed.
        start: The first block that was not looked at yet, counted through all queries.

    Returns:
        The first block for which there is too little room: call again with more room, to go on there. At the end, their number.

    Shapes: products [Q, N], allowed [N] or [0], margins [Q], bars [Q], counts [Q], limits [Q], notes [Q, room].
    """
    num_blocks = products.shape[1] // BLOCK
    flat = products.reshape(-1)
    for query in range(start // num_blocks, len(products)):
        bar, count = bars[query], counts[query]
        for block in range(max(start, query * num_blocks), (query + 1) * num_blocks):
            reached = _reached(flat, block * BLOCK, bar)
            if reached:
                if count >= limits[query]:
                    count, bar = _prune(notes[query], count, num_kept, margins[query], share, bar)
                    limits[query] = max(limits[query], count + count // 2)  # many may be as good as the last
                if count + BLOCK > notes.shape[1]:
                    bars[query], counts[query] = bar, count
                    return block
                while reached:
                    place = block * BLOCK + _first_one(reached)
                    reached &= reached - np.uint64(1)
                    column = place - query * products.shape[1]
                    if column < num_columns and (len(allowed) == 0 or allowed[column]):
                        notes[query, count] = (np.int64(_order_of(flat[place])) << 32) | (first_row + column)
                        count += 1
        bars[query], counts[query] = bar, count
    return int(len(products) * num_blocks)


@_compiled()
def _prune(notes: IntArray, count: int, num_kept: int, margin: float, share: float, like: int) -> tuple[int, int]:
    """Drops what cannot be among the best; returns how many are left, and the bar that they reach, in the type of ``like``."""
    last = _select(notes, count, num_kept) >> 32
    worst = _as_float(last, like)
    bar = _as_order(np.float32(worst - margin - share * abs(worst)), like)
    num_left = 0
    for place in range(count):
        if notes[place] >> 32 >= bar:
            notes[num_left] = notes[place]
            num_left += 1
    return num_left, bar


@_compiled()
def _select(notes: IntArray, count: int, num_kept: int) -> int:
    """Brings the greatest notes to the front, in no order; returns the least of them.

    Source: Hoare 1961, Algorithm 65: Find.
    """
    low, high = 0, count - 1
    while low < high:
        pivot, left, right = notes[(low + high) >> 1], low, high
        while left <= right:
            while notes[left] > pivot:
                left += 1
            while notes[right] < pivot:
                right -= 1
            if left <= right:
                notes[left], notes[right] = notes[right], notes[left]
                left, right = left + 1, right - 1
        if num_kept - 1 <= right:
            high = right
        elif num_kept - 1 >= left:
            low = left
        else:
            break
    return int(notes[num_kept - 1])


@_compiled()
def finish(
    queries: Floats,
    stored: npt.NDArray[Any],
    is_scaled: bool,
    num_kept: int,
    margins: Floats,
    share: float,
    bars: Bits,
    counts: IntArray,
    notes: IntArray,
) -> None:
    """Scores what was noted, and brings the best of each query to the front, with all that tie with the last of them.

    Args:
        queries: Any.
        stored: Of which as many components count as queries have.
        is_scaled: Whether each vector is brought to unit length first.
        num_kept: See ``note``.
        margins: See ``note``.
        share: See ``note``.
        bars: See ``note``.
        counts: Changed: how many are at the front.
        notes: Changed: of scores, now what ``read`` takes.

    Shapes: queries [Q, dim], stored [N, D], margins [Q], bars [Q], counts [Q], notes [Q, room].
    """
    for query in range(len(queries)):
        own, count = notes[query], counts[query]
        if count > num_kept:
            count, _ = _prune(own, count, num_kept, margins[query], share, bars[query])
        for place in range(count):
            row = own[place] & _ROW
            own[place] = _as_note(_score(queries[query], stored[row], is_scaled), row)
        if count > num_kept:
            count = _cut(own, count, num_kept)
        counts[query] = count


@_compiled()
def _cut(notes: IntArray, count: int, num_kept: int) -> int:
    """Brings the best to the front, and all that tie with the last of them; returns how many these are."""
    last, num_left = _select(notes, count, num_kept) >> 32, num_kept
    for place in range(num_kept, count):
        if notes[place] >> 32 == last:
            notes[num_left] = notes[place]
            num_left += 1
    return num_left


@_compiled()
def compare(
    query: Floats,
    stored: npt.NDArray[Any],
    is_scaled: bool,
    num_kept: int,
    first: int,
    last: int,
    allowed: npt.NDArray[np.bool_],
    notes: IntArray,
) -> int:
    """Scores a range of documents one by one; returns how many are noted: the best, with all that tie with the last of them.

    Args:
        query: Any.
        stored: See ``finish``.
        is_scaled: See ``finish``.
        num_kept: See ``note``.
        first: Row of the first document.
        last: Row behind the last one.
        allowed: Which rows may be found; empty: all.
        notes: Written: what ``read`` takes.

    Shapes: query [dim], stored [N, D], allowed [N] or [0], notes [last - first].
    """
    count, limit, bar = 0, 2 * num_kept + BLOCK, np.int64(-1) << 63
    for row in range(first, last):
        if len(allowed) == 0 or allowed[row]:
            known = _as_note(_score(query, stored[row], is_scaled), row)
            if known >= bar:
                notes[count] = known
                count += 1
                if count >= limit:
                    count = _cut(notes, count, num_kept)
                    bar = notes[:count].min() >> 32 << 32
                    limit = max(limit, 2 * count)  # many may tie
    return _cut(notes, count, num_kept) if count > num_kept else count


@_compiled()
def compare_lists(
    queries: Floats,
    stored: npt.NDArray[Any],
    edges: IntArray,
    rows: IntArray,
    allowed: npt.NDArray[np.bool_],
    lists: IntArray,
    starts: IntArray,
    numbers: IntArray,
    num_kept: int,
    counts: IntArray,
    notes: IntArray,
) -> bool:
    """Scores the documents of lists with the queries that look there, list by list; notes the best, as ``compare`` does.

    Each list is read once for every four of its queries, and stays in the cache meanwhile.

    Args:
        queries: Any.
        stored: Documents, list by list, to be used as they are.
        edges: Where each list begins, and where the last one ends.
        rows: Of the documents, as they are to be noted.
        allowed: Which rows may be found; empty: all.
        lists: That any query looks into.
        starts: Where the queries of each of these begin in ``numbers``, and where the last ones end.
        numbers: Of queries.
        num_kept: See ``note``.
        counts: Written: how many are noted.
        notes: Written: what ``read`` takes.

    Returns:
        Whether there was room enough; if not, call again with more.

    Shapes: queries [Q, dim], stored [N, dim], edges [L + 1], rows [N], allowed [N] or [0], lists [M], starts [M + 1],
    numbers [P], counts [Q], notes [Q, room].
    """
    counts[:] = 0
    bars = np.full(len(queries), -np.inf, np.float32)
    for place in range(len(lists)):
        first, last, end = edges[lists[place]], edges[lists[place] + 1], starts[place + 1]
        for start in range(starts[place], end, 4):
            # Where there are fewer than four, the last one stands in: every score is computed by the same instructions.
            places = start, min(start + 1, end - 1), min(start + 2, end - 1), min(start + 3, end - 1)
            own = numbers[places[0]], numbers[places[1]], numbers[places[2]], numbers[places[3]]
            one, two, three, four = queries[own[0]], queries[own[1]], queries[own[2]], queries[own[3]]
            for position in range(first, last):
                scores = _score_four(one, two, three, four, stored[position])
                for which in range(min(end - start, 4)):
                    query, row = own[which], rows[position]
                    if scores[which] >= bars[query] and (len(allowed) == 0 or allowed[row]):
                        count = counts[query]
                        notes[query, count] = _as_note(scores[which], row)
                        count += 1
                        if count == notes.shape[1]:
                            count = _cut(notes[query], count, num_kept)
                            if count == notes.shape[1]:
                                return False
                            bars[query] = _as_float(notes[query, :count].min() >> 32, np.int32(0))
                        counts[query] = count
    for query in range(len(queries)):
        if counts[query] > num_kept:
            counts[query] = _cut(notes[query], counts[query], num_kept)
    return True


@_compiled(**_SUMS)
def _score_four(
    one: Floats, two: Floats, three: Floats, four: Floats, vector: npt.NDArray[Any]
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Returns the inner products of four queries with a vector, each of whose components is widened once."""
    first, second, third, fourth = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for place in range(len(one)):
        component = _widen(vector[place])
        first += one[place] * component
        second += two[place] * component
        third += three[place] * component
        fourth += four[place] * component
    return first, second, third, fourth


@_compiled()
def _as_note(score: np.float32, row: int) -> int:
    """Returns a note of a final score; ``read`` takes it."""
    return int((np.int64(_as_order(np.float32(score), np.int32(0))) << 32) | row)


def read(notes: IntArray) -> tuple[Floats, IntArray]:
    """Returns the scores and rows of notes of final scores."""
    order = (notes >> 32).astype(np.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32), notes & _ROW


@_compiled(**_SUMS)
def _score(query: Floats, vector: npt.NDArray[Any], is_scaled: bool) -> np.float32:
    product, square = np.float32(0), np.float32(0)
    if is_scaled:
        for place in range(len(query)):
            component = _widen(vector[place])
            product += query[place] * component
            square += component * component
        return product / np.sqrt(square) if square > 0 else product
    for place in range(len(query)):
        product += query[place] * _widen(vector[place])
    return product


@_compiled()
def score_pairs(
    queries: Floats, stored: npt.NDArray[Any], is_scaled: bool, numbers: IntArray, rows: IntArray, scores: Floats
) -> None:
    """Writes the inner products of chosen queries with chosen vectors, pair by pair; see ``finish``.

    Shapes: queries [Q, dim], stored [N, D], numbers [P], rows [P], scores [P].
    """
    for place in range(len(rows)):
        scores[place] = _score(queries[numbers[place]], stored[rows[place]], is_scaled)
