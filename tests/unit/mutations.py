"""Damaged input by the thousand, and the law that whoever reads it obeys: it works, or says in a sentence what is wrong."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

DEEP = 100_000
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "0", "-1", ".", "..", "../..", "../../../etc/passwd", "/etc/passwd", "/", "a\0b", "a\\..\\b", "C:\\x", "\ud800",
    "\n", "é" * 300, "a/" * 3_000, "9" * 5_000, "s3://bucket/x", "1e5", "64:5", "8:3:x=1", [], [[]], [None], [1], ["x"], {},
    {"": None}, {"x": {"x": []}}, [["x", 1, 2]],
]  # fmt: skip

_SENTENCE = re.compile(r"(?s)\S.*: \S.*[.?)'\"]")
_DEADLINE = timedelta(seconds=20)  # nothing takes a second; on a busy machine a pause may


def run(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Gives at least so many examples of a strategy to a check: always the same ones."""
    seen = 0

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=_DEADLINE,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @hypothesis.given(strategy)
    def law(example: Any) -> None:
        nonlocal seen
        seen += 1
        check(example)

    law()
    assert seen >= count, f"{seen} of {count} examples"


def obeys(act: Callable[[], Any]) -> Any:
    """Returns what a function gives, or None where it refuses in the way that it should; any other error is a failure."""
    try:
        return act()
    except Exception as error:
        refusal = error
    is_own = type(refusal).__module__.startswith(("matryoshka", "jobs"))
    assert type(refusal) in (ValueError, RuntimeError) or isinstance(refusal, OSError) or is_own, repr(refusal)
    str(refusal).encode()  # or it could not be shown
    if isinstance(refusal, ValueError):
        assert _SENTENCE.fullmatch(str(refusal)), f"not a sentence of the house's form: {refusal}"
    return None


def json_mutants(value: Any) -> st.SearchStrategy[bytes]:
    """Returns a strategy of JSON files: a valid one in which one to three things are replaced, dropped, doubled or exchanged."""
    steps = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=3)
    whole = json.dumps(value).encode()
    return st.one_of(
        steps.map(lambda own: _dump(_mutate(value, own))), steps.map(lambda own: _dump(_mutate(value, own))), byte_mutants(whole)
    )


def changes(value: Any) -> st.SearchStrategy[Any]:
    """Returns a strategy of JSON values: as ``json_mutants``, before they are written."""
    steps = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=3)
    return steps.map(lambda own: _mutate(value, own))


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _mutate(value: Any, steps: list[tuple[int, int]]) -> Any:
    root = [copy.deepcopy(value)]
    for where, how in steps:
        nodes = list(_nodes(root))
        parent, key = nodes[where % len(nodes)]
        kind, other = how % 8, nodes[how % len(nodes)]
        if kind == 0 and parent is not root:
            del parent[key]
        elif kind == 1:
            parent[key] = copy.deepcopy(other[0][other[1]])
        elif kind == 2 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif kind == 3 and isinstance(parent, list) and parent is not root:
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(JUNK[how // 8 % len(JUNK)])
    return root[0]


def _nodes(parent: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
        yield parent, key
        if isinstance(parent[key], (dict, list)):
            yield from _nodes(parent[key])


def byte_mutants(data: bytes) -> st.SearchStrategy[bytes]:
    """Returns a strategy of damaged bytes: flipped, cut off, left out, doubled, or followed by something else."""
    return st.tuples(st.integers(0, 2**32), st.sampled_from(_DAMAGES)).map(
        lambda own: own[1](bytearray(data), random.Random(own[0]))
    )


def _flip(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def _cut(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.randrange(len(data))])


def _splice(data: bytearray, chance: random.Random) -> bytes:
    start, stop = sorted(chance.randrange(len(data)) for _ in range(2))
    place = chance.randrange(len(data))
    return bytes(data[:place] + data[start:stop] + data[place:])


def _drop(data: bytearray, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return bytes(data[:start] + data[start + chance.randint(1, 64) :])


def _follow(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data) + chance.randbytes(chance.randint(1, 64))


_DAMAGES = (_flip, _flip, _cut, _splice, _drop, _follow)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Returns everything below a folder: what a reader must leave as it is."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
