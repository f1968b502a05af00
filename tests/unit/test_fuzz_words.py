"""Conditions, plans, settings and YAML in every form of wrong: understood, or refused in a sentence."""

import importlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import strategies as st
from mutations import byte_mutants, changes, obeys, run

from jobs import reference
from matryoshka import conditions, config, filters
from matryoshka.nested import FunnelPlan

COLUMNS = pa.record_batch(
    {
        "year": pa.array([2019, None, 2**62]),
        "score": pa.array([0.5, float("nan"), None]),
        "title": pa.array(["a", None, "%x_"], pa.large_string()),
        "flag": pa.array([True, False, None]),
        "day": pa.array([0, 1, None], pa.date32()),
        "at": pa.array([0, 1, None], pa.timestamp("us")),
        "kind": pa.array(["a", "b", None]).dictionary_encode(),
    }
)
NAMES = [*COLUMNS.schema.names, "nobody", '"title"', '""']
KEYWORDS = ["AND", "or", "NOT", "In", "between", "IS", "null", "LIKE", "true", "FALSE", "(", ")", ","]
OPERATORS = ["=", "<>", "!=", "<", "<=", ">", ">="]
VALUES = ["1", "-5", "0.5", "1e400", "9" * 400, "1e308", "'a'", "'%'", "'2024-12-31'", "'2024-13-41'", "''", "'it''s'", "TRUE"]
WORDS = [*NAMES, *KEYWORDS, *OPERATORS, *VALUES, "'", '"', "\0", "\u00e9", "\ud800", ";", "--", "%", "\\", "\n"]


def sentences(words: list[str], most: int = 9) -> st.SearchStrategy[str]:
    """Returns a strategy of words in a row, half of them with a grammar of a kind."""

    def make(seed: int) -> str:
        chance = random.Random(seed)
        return chance.choice([" ", " ", ""]).join(chance.choices(words, k=chance.randint(1, most)))

    return st.integers(0, 2**32).map(make)


def comparisons() -> st.SearchStrategy[str]:
    """Returns a strategy of conditions that are nearly right."""

    def leaf(chance: random.Random) -> str:
        some = ", ".join(chance.choices(VALUES, k=chance.randint(1, 3)))
        one = f"{chance.choice(OPERATORS)} {chance.choice(VALUES)}"
        like, within = f"LIKE {chance.choice(VALUES)}", f"BETWEEN {chance.choice(VALUES)} AND {chance.choice(VALUES)}"
        return f"{chance.choice(NAMES)} {chance.choice([one, one, f'IN ({some})', 'IS NULL', like, within])}"

    def make(seed: int) -> str:
        chance = random.Random(seed)
        return f"{leaf(chance)} {chance.choice(['AND', 'OR NOT', ''])} {leaf(chance)}"

    return st.integers(0, 2**32).map(make)


@pytest.mark.parametrize("texts", [sentences(WORDS), comparisons()], ids=["words", "comparisons"])
def test_a_condition_is_understood_or_refused(texts: st.SearchStrategy[str]):
    def check(text: str) -> None:
        condition = obeys(lambda: conditions.parse(text))
        if condition:
            mask = obeys(lambda: filters.select(COLUMNS, condition))
            assert mask is None or len(mask) == len(COLUMNS)

    run(800, texts, check)


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "NOT " * 100_000 + "year = 1", "year = 1 AND " * 2_000 + "year = 1", "'" * 99_999]
)
def test_a_condition_of_any_length_is_understood_or_refused(text: str):
    condition = obeys(lambda: conditions.parse(text))
    if condition:
        obeys(lambda: filters.select(COLUMNS, condition))


PARTS = [
    "64",
    "200",
    "384",
    "0",
    "-1",
    ":",
    ":",
    ",",
    "nprobe",
    "=",
    "=",
    "16",
    "\u0664",
    "\u00b2",
    " ",
    "",
    "x",
    "9" * 5_000,
    "1e3",
    "\0",
]


def test_a_plan_is_understood_or_refused():
    def check(text: str) -> None:
        plan = obeys(lambda: FunnelPlan.parse(text.split(",")))
        if plan:
            assert FunnelPlan.parse(plan.parts) == plan

    run(800, sentences(PARTS, most=12), check)


@pytest.mark.parametrize("job", reference.JOBS)
def test_the_settings_of_a_job_are_understood_or_refused(job: str, tmp_path: Path):
    settings = importlib.import_module(f"jobs.{job}").Settings
    usual = {name: field.default for name, field in settings.model_fields.items() if not field.is_required()}
    whole = {**usual, **{name: "x" for name, field in settings.model_fields.items() if field.is_required()}}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in whole.items()}
    path = tmp_path / "job.yaml"

    def check(own: Any) -> None:
        if isinstance(own, dict):
            obeys(lambda: settings.from_values(own, "job.yaml"))

    run(80, changes(values), check)

    def check_file(data: bytes) -> None:
        path.write_bytes(data)
        obeys(lambda: settings.from_command_line(["--config", str(path)], job))

    run(20, byte_mutants(yaml.safe_dump(values).encode()), check_file)


YAML = b"""output: runs/x
prepare: {pairs: a.parquet, splits: [train, "test"]}
dims: [64, 32]
when: 2024-02-30
number: 0x1f
text: &anchor |
  several
  lines
again: *anchor
"""


def test_a_yaml_file_is_understood_or_refused(tmp_path: Path):
    path = tmp_path / "job.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        obeys(lambda: config.read_yaml(path))

    run(400, byte_mutants(YAML), check)


LAUGHS = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]" for n in range(12)])
HARM = {
    "code": "!!python/object/apply:os.system ['touch x']",
    "brackets": "[" * 5_000,
    "nested": "a: " * 3_000,
    "dashes": "- " * 3_000,
    "itself": "a: &a [*a]",
    "itself within": "corpus: &a {b: [*a]}",
    "key": "? {}\n: 1",
    "anchor": "&a a: *b",
    "laughs": LAUGHS,
    "laughs as a setting": LAUGHS.replace("a0: ", "corpus: "),
}


@pytest.mark.parametrize("text", HARM.values(), ids=HARM)
def test_yaml_that_is_made_to_harm_does_none(tmp_path: Path, text: str):
    (tmp_path / "job.yaml").write_text(text)
    found = obeys(lambda: config.read_yaml(tmp_path / "job.yaml"))
    settings = importlib.import_module("jobs.embed").Settings
    if found:
        obeys(lambda: settings.from_values({"corpus": next(iter(found.values()))}, "job.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]
