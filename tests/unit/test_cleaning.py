from typing import Any

import datasets_by_hand as datasets
import pyarrow.parquet as pq
import pytest
import texts
from datasets_by_hand import COLUMNS, FRACTIONS, RULES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka import corpus, preparation, units
from matryoshka.assembly import SHARED
from matryoshka.cleaning import PairColumns, Rules, fold, fold_query
from matryoshka.corpus import Columns
from matryoshka.pairs import DatasetStore
from matryoshka.partitions import text_id
from matryoshka.splits import SplitRule

Rows = list[dict[str, Any]]

word = st.sampled_from(["", " ", "a", "A", "b", " a  b", "a b", "c"])
# A text may stand under two ids, but never two texts under one.
some_rows = st.lists(
    st.builds(
        lambda query, positive, group, copy: {
            "query": query,
            "positive": positive,
            "group": group,
            "id": f"{fold(positive)} {copy}",
        },
        word,
        word,
        st.sampled_from("stuvwxyz"),  # of every split
        st.sampled_from("12"),
    ),
    min_size=1,
    max_size=20,
)
one_to_one = Rules(RULES.splits, one_to_one=True)
quick = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def prepare(tmp_path_factory: pytest.TempPathFactory):
    """Prepares rows, cut into as many files as asked for; where nothing is left, there is no dataset."""

    def make(rows: Rows, rules: Rules = RULES, *, columns: PairColumns = COLUMNS, num_files: int = 1, **how: Any):
        root = tmp_path_factory.mktemp("prepare")
        step = -(-len(rows) // num_files)
        for number, start in enumerate(range(0, len(rows), step)):
            part = rows[start : start + step]
            texts.write_parquet(root / "in" / f"{number}.parquet", {name: [row[name] for row in part] for name in part[0]})
        source = preparation.from_pairs(sorted((root / "in").iterdir()), columns, rules)
        return datasets.prepare(source, root / "out", rules, **how)

    return make


def try_prepare(make: Any, rows: Rows, rules: Rules = RULES, **how: Any) -> DatasetStore | None:
    try:
        return make(rows, rules, **how)
    except ValueError as error:
        if "no pair with text is left" in str(error):
            return None
        raise


def documents_of(store: DatasetStore) -> dict[str, str]:
    return dict(zip(*corpus.read_texts(corpus.inspect(store.corpus, Columns())), strict=True))


def judged(store: DatasetStore) -> dict[str, list[tuple[str, str]]]:
    """(query id, document id) of every judgement, by split."""
    tables = {split: pq.read_table(store.folder / "qrels" / f"{split}.parquet").to_pydict() for split in store.splits}
    return {split: list(zip(table["query_id"], table["document_id"], strict=True)) for split, table in tables.items()}


def queries_of(store: DatasetStore) -> dict[str, dict[str, str]]:
    tables = {split: pq.read_table(store.folder / "queries" / f"{split}.parquet").to_pydict() for split in store.splits}
    return {split: dict(zip(table["id"], table["text"], strict=True)) for split, table in tables.items()}


@quick
@given(some_rows, st.booleans(), st.sampled_from([None, 1, 3]))
def test_every_pair_is_kept_or_counted(prepare, rows: Rows, is_one_to_one: bool, limit: int | None):
    rules = Rules(RULES.splits, {"train": limit}, one_to_one=is_one_to_one)
    store = try_prepare(prepare, rows, rules)
    if store:
        num_kept = sum(map(len, judged(store).values()))
        dropped = dict(store.manifest.facts["dropped"])
        num_withheld = dropped.pop(SHARED, 0)
        assert num_kept + sum(dropped.values()) == len(rows)
        assert store.num_pairs + num_withheld == len(judged(store).get("train", ()))
        assert all(text.strip() for own in queries_of(store).values() for text in own.values())


@quick
@given(some_rows, st.booleans())
def test_no_query_is_in_two_splits_no_pair_has_a_document_of_dev_or_test_and_no_text_stands_twice(
    prepare, rows: Rows, is_one_to_one: bool
):
    store = try_prepare(prepare, rows, one_to_one if is_one_to_one else RULES)
    if store:
        queries = [fold_query(text) for own in queries_of(store).values() for text in own.values()]
        assert len(set(queries)) == len(queries)
        documents = documents_of(store)
        assert len({fold(text) for text in documents.values()}) == len(documents)
        by_split = {split: {document for _, document in own} for split, own in judged(store).items()}
        assert set().union(*by_split.values()) == documents.keys()
        asked = by_split.get("test", set()) | by_split.get("dev", set())
        trained = datasets.columns_of(store.pair_files())["document_id"] if store.num_pairs else []
        assert set(trained) == by_split.get("train", set()) - asked


@quick
@given(some_rows)
def test_every_judgement_is_a_pair_of_the_input(prepare, rows: Rows):
    known = {(fold_query(row["query"]), fold(row["positive"])) for row in rows}
    store = try_prepare(prepare, rows)
    if store:
        documents, queries = documents_of(store), queries_of(store)
        for split, own in judged(store).items():
            assert {(fold_query(queries[split][query]), fold(documents[document])) for query, document in own} <= known


@quick
@given(some_rows, st.integers(2, 5))
def test_neither_files_partitions_nor_the_order_of_tasks_change_a_byte(prepare, rows: Rows, number: int):
    one = try_prepare(prepare, rows, num_partitions=1)
    if one:
        same = prepare(rows, num_partitions=number * 7, run=datasets.backwards)
        assert one.manifest.fingerprint == same.manifest.fingerprint
        cut = prepare(rows, num_files=number, num_partitions=number)
        assert (judged(cut), queries_of(cut), documents_of(cut)) == (judged(one), queries_of(one), documents_of(one))


@quick
@given(some_rows)
def test_one_to_one_leaves_each_query_its_document_alone(prepare, rows: Rows):
    store = try_prepare(prepare, rows, one_to_one)
    if store:
        found = [pair for own in judged(store).values() for pair in own]
        assert len({query for query, _ in found}) == len({document for _, document in found}) == len(found)


def rows_of(*values: tuple[str, str, str, str]) -> Rows:
    return [dict(zip(("query", "positive", "group", "id"), value, strict=True)) for value in values]


ALL_TRAIN = Rules(SplitRule("hash", {"train": 1.0}, "salt"))


def test_a_query_keeps_several_documents_and_a_document_several_queries(prepare):
    rows = rows_of(("one", "a", "x", "d1"), ("ONE", "b", "x", "d2"), ("two", " a ", "x", "d3"), ("one ", "a", "x", "d1"))
    one, two = text_id("q", "one"), text_id("q", "two")
    store = prepare(rows, ALL_TRAIN)
    assert documents_of(store) == {"d1": "a", "d2": "b"}  # d3 has the text of d1
    assert queries_of(store)["train"] == {one: "one", two: "two"}
    assert sorted(judged(store)["train"]) == sorted([(one, "d1"), (one, "d2"), (two, "d1")])
    assert store.manifest.facts["dropped"] == {"duplicate": 1}
    written = datasets.columns_of(store.pair_files())
    assert sorted(zip(written["query"], written["positive"], strict=True)) == [("one", "a"), ("one", "b"), ("two", "a")]


GROUP_OF = {units.choose_split(group, FRACTIONS, "salt"): group for group in "stuvwxyz"}


def test_a_query_in_several_splits_stays_in_test_then_dev_then_train_with_all_its_answers(prepare):
    rows = rows_of(
        ("one", "a", GROUP_OF["train"], "d1"),
        ("One", "b", GROUP_OF["test"], "d2"),
        ("two", "c", GROUP_OF["train"], "d3"),
        ("two", "d", GROUP_OF["train"], "d4"),
        ("three", "c", GROUP_OF["dev"], "d3"),
    )
    store = prepare(rows)
    one, two, three = (text_id("q", query) for query in ("one", "two", "three"))
    found = {split: sorted(own) for split, own in judged(store).items()}
    assert found == {"test": [(one, "d1"), (one, "d2")], "dev": [(three, "d3")], "train": [(two, "d3"), (two, "d4")]}
    assert datasets.columns_of(store.pair_files())["positive"] == ["d"]
    assert store.manifest.facts["dropped"] == {SHARED: 1}


def with_answers(num_queries: int, num_answers: int) -> Rows:
    return [{"query": f"query {n}", "positive": f"answer {m} of {n}"} for n in range(num_queries) for m in range(num_answers)]


def test_queries_with_several_answers_are_split_by_their_shares_and_new_answers_move_none(prepare):
    few, many = (prepare(with_answers(1_000, number), columns=PairColumns("query", "positive")) for number in (1, 4))
    assert queries_of(few) == queries_of(many)
    shares = {split: len(own) / 1_000 for split, own in queries_of(many).items()}
    assert shares == pytest.approx(FRACTIONS, abs=0.05)
    assert {split: len(own) for split, own in judged(many).items()} == {
        split: 4 * len(own) for split, own in queries_of(many).items()
    }
    assert many.num_pairs == len(judged(many)["train"])


def distinct(count: int) -> Rows:
    return rows_of(*((f"query {n}", f"document {n}", f"group {n % 40}", f"d{n}") for n in range(count)))


def test_a_group_is_never_cut_and_new_data_never_moves_an_old_row(prepare):
    few, many = (prepare(distinct(count)) for count in (100, 200))
    split_of = [{document: split for split, own in judged(store).items() for _, document in own} for store in (few, many)]
    assert split_of[0].items() <= split_of[1].items()
    groups = {(int(document[1:]) % 40, split) for document, split in split_of[1].items()}
    assert len(groups) == 40


def test_a_larger_limit_only_adds(prepare):
    few, many = (prepare(distinct(200), Rules(RULES.splits, {"train": limit, "test": 10})) for limit in (20, 50))
    assert set(judged(few)["train"]) <= set(judged(many)["train"])
    assert (len(judged(few)["train"]), len(judged(many)["train"])) == (20, 50)
    assert (judged(few)["test"], judged(few)["dev"]) == (judged(many)["test"], judged(many)["dev"])
    assert few.manifest.facts["queries"] == {split: len(own) for split, own in judged(few).items()}


def test_short_texts_are_left_out_and_counted(prepare):
    rows = rows_of(("long query", "long document", "x", "1"), ("q", "long document 2", "x", "2"), ("long one", "d", "x", "3"))
    store = prepare(rows, Rules(ALL_TRAIN.splits, min_query=3, min_document=5))
    assert (list(documents_of(store)), store.manifest.facts["dropped"]) == (["1"], {"too short": 2})


NEGATIVES = PairColumns("query", "positive", "negatives")


def test_negatives_of_a_query_go_with_all_its_pairs_under_the_ids_of_the_corpus(prepare):
    rows = [
        {"query": "one", "positive": "a", "negatives": ["b", " c"]},
        {"query": "One", "positive": "d", "negatives": ["c", ""]},
        {"query": "two", "positive": "b", "negatives": []},
    ]
    store = prepare(rows, ALL_TRAIN, columns=NEGATIVES)
    found = datasets.columns_of(store.pair_files())
    negatives = dict(zip(found["positive"], zip(found["negatives"], found["negative_ids"], strict=True), strict=True))
    both = (["b", "c"], [text_id("d", "b"), text_id("d", "c")])
    assert negatives == {"a": both, "d": both, "b": ([], [])}
    assert text_id("d", "b") in documents_of(store)


def test_a_contradiction_names_file_and_rows(prepare):
    rows = [
        {"query": "one", "positive": "a", "negatives": ["b"]},
        {"query": "two", "positive": "a", "negatives": ["b"]},
        {"query": "ONE", "positive": "c", "negatives": [" a "]},
    ]
    message = r"0\.parquet: row 0 and row 2: the same text answers 'ONE' and does not\. Mend or take out these rows"
    with pytest.raises(ValueError, match=message):
        prepare(rows, columns=NEGATIVES)


def test_an_id_that_stands_for_two_texts_is_named_with_its_rows(prepare):
    rows = rows_of(("one", "a", "x", "d1"), ("two", "c", "x", "d2"), ("three", "b", "x", "d1"))
    with pytest.raises(ValueError, match=r"0\.parquet: row 0 and .*1\.parquet: row 0: id 'd1' stands for two different texts"):
        prepare(rows, num_files=2)


def test_pairs_of_which_nothing_is_left_are_refused_with_the_counts(prepare):
    with pytest.raises(ValueError, match=r"no pair with text is left \(left out: 1 empty, 1 too short\)\. Check the columns"):
        prepare(rows_of(("", "a", "x", "1"), ("b", "c", "x", "2")), Rules(RULES.splits, min_document=2))


def test_a_split_column_gives_the_splits(prepare):
    columns = PairColumns("query", "positive", split="split")
    rows = [{"query": f"q{n}", "positive": f"d{n}", "split": split} for n, split in enumerate(("train", "Validation", "test"))]
    store = prepare(rows, Rules(SplitRule("column", FRACTIONS, "salt")), columns=columns)
    assert {split: list(own.values()) for split, own in queries_of(store).items()} == {
        "train": ["q0"],
        "dev": ["q1"],
        "test": ["q2"],
    }
    rows[1]["split"] = "exam"
    with pytest.raises(ValueError, match=r"0\.parquet: row 1: no split 'exam'\. Write train, dev or test, or leave --split-col"):
        prepare(rows, columns=columns)


@pytest.mark.parametrize("column", ["id", "group"])
def test_a_row_without_id_or_group_is_named(prepare, column: str):
    rows = distinct(2)
    rows[1][column] = None
    with pytest.raises(ValueError, match=r"0\.parquet: row 1 has no id or no group\. Fill the column, or leave its option out"):
        prepare(rows)
