import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import splits
from matryoshka.splits import Sample, SplitRule

keys = st.lists(st.text(max_size=5), unique=True, max_size=40)


def sample(names: list[str], limit: int | None, num_tasks: int = 1) -> list[str]:
    """What a limit lets in, where each of several tasks has seen a part."""
    whole = Sample({"train": limit}, "salt")
    for task in range(num_tasks):
        part = Sample({"train": limit}, "salt")
        for name in names[task::num_tasks]:
            part.add("train", name)
        whole.merge(part.cut())
    return [name for name in names if splits.is_let_in(name, "train", whole.cutoffs(), "salt")]


@settings(deadline=None)
@given(keys, st.integers(1, 30), st.integers(0, 30))
def test_a_larger_limit_only_adds(names: list[str], limit: int, more: int):
    assert set(sample(names, limit)) <= set(sample(names, limit + more))
    assert len(sample(names, limit)) == min(limit, len(names))


@settings(deadline=None)
@given(keys, st.integers(1, 30), st.integers(1, 5))
def test_a_sample_does_not_depend_on_who_saw_what(names: list[str], limit: int, num_tasks: int):
    assert sample(names, limit) == sample(names, limit, num_tasks)
    assert set(sample(names[::-1], limit)) == set(sample(names, limit))


@settings(deadline=None)
@given(keys)
def test_no_limit_takes_all(names: list[str]):
    assert sample(names, None) == names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a/train.csv", "train"),
        ("Test.parquet", "test"),
        ("validation-00000-of-00002.parquet", "dev"),
        ("val_1.jsonl", "dev"),
        ("dev", "dev"),
        ("training.csv", None),
        ("train/data.csv", "train"),
        ("default/test/0000.parquet", "test"),
        ("Validation/train/0000.parquet", "train"),
        ("train/test-0.parquet", "test"),
        ("training/data.csv", None),
        ("latest.csv", None),
    ],
)
def test_the_beginning_of_a_file_name_or_else_a_folder_says_its_split(name: str, split: str | None):
    assert splits.of_file(name) == split


def test_folders_above_the_input_say_nothing():
    rule = SplitRule("files", {}, "salt", "/data/train")
    assert [rule.of_path(f"/data/train/{name}") for name in ("0.csv", "test/0.csv", "train-0.csv")] == ["", "test", "train"]


def test_files_with_and_without_split_are_refused():
    splits.check_names(["train.csv", "test.csv"])
    with pytest.raises(
        ValueError, match=r"more\.csv: neither its name nor its folder's says a split\. Begin one with train, dev"
    ):
        splits.check_names(["train.csv", "more.csv"])


def test_a_text_stays_in_the_strongest_of_its_splits():
    assert [splits.strongest(own) for own in (["train", "dev"], ["dev", "test"], ["train"])] == ["dev", "test", "train"]
