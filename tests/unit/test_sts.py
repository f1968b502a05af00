"""Scored pairs of sentences, in the three forms that they come in."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka import sts
from matryoshka.sts import ScoredPairs

OWN = (
    'main-captions\tMSRvid\t2012test\t0024\t2.500\tA "quoted word.\tOne, with a comma\n'
    "main-forums\tdeft\t2014\t0025\t4.0\tFirst.\tSecond.\tsource one\tsource two\n"
)
PAIRS = ScoredPairs((2.5, 4.0), ('A "quoted word.', "First."), ("One, with a comma", "Second."), 0)


def write(folder: Path, text: str) -> Path:
    path = folder / "sts.csv"
    path.write_text(text, "utf-8")
    return path


def test_the_benchmarks_own_file_is_read_without_quoting_and_whatever_stands_behind_the_sentences(tmp_path: Path):
    assert sts.read(write(tmp_path, OWN)) == PAIRS


def test_csv_is_read_by_the_names_of_its_columns(tmp_path: Path):
    text = 'sentence2,score,more,sentence1\n"One, with a comma",2.5,x,"A ""quoted word."\nSecond.,4,,First.\n'
    assert sts.read(write(tmp_path, text)) == PAIRS


def test_a_header_decides_over_what_the_fifth_column_looks_like(tmp_path: Path):
    head = "index\tgenre\tfile\tyear\tnumber\tsource1\tsource2\tsentence1\tsentence2\tscore\r\n"
    text = head + 'a\tb\tc\td\t7\tnone\tnone\tA "quoted word.\tOne, with a comma\t2.5\r\n'
    assert sts.read(write(tmp_path, text + "a\tb\tc\td\t8\tx\ty\tFirst.\tSecond.\t4\r\n")) == PAIRS


def test_a_quoted_sentence_may_have_two_lines(tmp_path: Path):
    text = 'score,sentence1,sentence2\n1,"a\nb",c\n2,d,e\n'
    assert sts.read(write(tmp_path, text)).firsts == ("a\nb", "d")


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_parquet_is_read_whatever_its_name(tmp_path: Path, kind: pa.DataType):
    path = tmp_path / "sts.bin"
    columns = {"score": pa.array(PAIRS.scores, kind), "sentence1": PAIRS.firsts, "sentence2": PAIRS.seconds}
    pq.write_table(pa.table(columns), path)
    assert sts.read(path) == PAIRS


def test_rows_without_a_score_or_a_sentence_are_counted(tmp_path: Path):
    spoilt = OWN + "a\tb\tc\td\tnan\tx\ty\na\tb\tc\td\t1.0\tx\t \na\tb\n"
    assert sts.read(write(tmp_path, spoilt)) == ScoredPairs(PAIRS.scores, PAIRS.firsts, PAIRS.seconds, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no column 'score' \(found: nothing\)"),
        ("score,first,second\n1,a,b\n", r"no column 'sentence1' \(found: 'score', 'first', 'second'\)\. Name the columns score,"),
        ("score,sentence1,sentence2\nhigh,a,b\n,c,d\n", r"no row with a score and two sentences \(2 rows\)"),
        ("score,sentence1,sentence2\n1,a,b\n1.0,c,d\n", "all 2 rows have the same score"),
    ],
)
def test_a_file_without_usable_rows_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        sts.read(write(tmp_path, text))


def test_a_file_that_is_missing_or_not_utf8_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        sts.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read"):
        sts.read(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        sts.read(tmp_path / "latin")


def test_a_parquet_file_with_other_columns_is_named(tmp_path: Path):
    pq.write_table(pa.table({"score": [1.0], "a": ["x"]}), tmp_path / "sts.parquet")
    with pytest.raises(ValueError, match=r"no column 'sentence1' \(found: 'score', 'a'\)"):
        sts.read(tmp_path / "sts.parquet")
