import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka import partitions, storage
from matryoshka.partitions import Dealer

if TYPE_CHECKING:
    from faulty_proxy import Proxy


class Row(NamedTuple):
    key: str
    number: int
    texts: list[str]


rows = st.lists(
    st.builds(Row, st.text(max_size=3), st.integers(0, 2**60), st.lists(st.text(max_size=2), max_size=2)), max_size=30
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.integers(1, 5), st.integers(1, 9))
def test_every_row_comes_back_once_in_its_partition(
    tmp_path_factory: pytest.TempPathFactory, dealt: list[Row], count: int, most: int
):
    folder = tmp_path_factory.mktemp("rows")
    place = {row.key: partitions.partition_of(partitions.text_id("k", row.key), count) for row in dealt}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "_ROWS_AT_ONCE", most)
        for task in range(2):
            with Dealer(folder, f"task-{task}", Row, count) as dealer:
                for row in dealt[task::2]:
                    dealer.add(place[row.key], row)
    found = [list(partitions.read(folder, Row, number)) for number in range(count)]
    expected = [[row for task in range(2) for row in dealt[task::2] if place[row.key] == number] for number in range(count)]
    assert found == expected


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), max_size=30), st.integers(1, 9))
def test_sorted_partitions_one_after_the_other_are_sorted(texts: list[str], count: int):
    keys = [partitions.text_id("k", text) for text in texts]
    dealt = [sorted(key for key in keys if partitions.partition_of(key, count) == number) for number in range(count)]
    assert [key for own in dealt for key in own] == sorted(keys)


def test_a_task_that_is_done_again_replaces_what_it_wrote_and_one_that_fails_writes_nothing(tmp_path: Path):
    for number in (1, 2):
        with Dealer(tmp_path, "task", Row, 1) as dealer:
            dealer.add(0, Row("a", number, []))
    failing = Dealer(tmp_path, "other", Row, 1)
    failing.add(0, Row("b", 1, []))
    failing.__exit__(RuntimeError, RuntimeError("half way"), None)
    assert list(partitions.read(tmp_path, Row, 0)) == [Row("a", 2, [])]


def test_of_a_large_file_in_a_bucket_only_the_partition_that_is_read_is_fetched(s3: "Proxy", bucket: str):
    folder, noise = storage.place(bucket) / "rows", random.Random(7)
    dealt = [Row(noise.randbytes(50_000).hex(), number, [str(number)]) for number in range(40)]
    with Dealer(folder, "task", Row, 20) as dealer:
        for row in dealt:
            dealer.add(row.number % 20, row)
    (num_bytes,) = storage.sizes(folder).values()
    s3.requests.clear()
    assert list(partitions.read(folder, Row, 3)) == [dealt[3], dealt[23]]
    assert num_bytes > partitions._SMALL_BYTES
    assert sum(request.num_bytes for request in s3.requests if request.method == "GET") < num_bytes / 5


def test_an_id_made_from_text_is_the_same_for_ever():
    # SHA-256 of the empty text begins with e3b0c44298fc1c14.
    assert partitions.text_id("d", "") == "d-e3b0c44298fc1c14"
