from pathlib import Path

import pytest

from matryoshka import corpus

LINES = {
    "not JSON": (b'{"_id": "1"}\n{"_id": \n', r"line 2 is not a JSON object of texts\. Mend it"),
    "a list": (b'["_id"]\n', r"line 1 is not a JSON object"),
    "a number": (b"5\n", r"line 1 is not a JSON object"),
    "no id": (b'\n{"text": "x"}\n', r"line 2 is not a JSON object with '_id'"),
    "empty id": (b'{"_id": ""}\n', r"line 1 is not a JSON object with '_id'"),
    "null id": (b'{"_id": null}\n', r"line 1 is not a JSON object with '_id'"),
    "fraction for an id": (b'{"_id": 1.0}\n', r"line 1 is not a JSON object of texts"),
    "truth for an id": (b'{"_id": true}\n', r"line 1 is not a JSON object of texts"),
    "number for text": (b'{"_id": "1"}\n{"_id": "2", "text": 0}\n', r"line 2 is not a JSON object of texts"),
    "list for text": (b'{"_id": "1", "text": []}\n', r"line 1 is not a JSON object of texts"),
    "half a surrogate pair": (b'{"_id": "1", "text": "\\ud83d"}\n', r"line 1 is not a JSON object of texts"),
    "not UTF-8": (b'{"_id": "\xff"}\n', r"not UTF-8 \(.*\)\. Convert the file to UTF-8"),
}


@pytest.mark.parametrize("fault", LINES)
def test_every_fault_of_a_json_lines_file_is_named(tmp_path: Path, fault: str):
    content, message = LINES[fault]
    (tmp_path / "corpus.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"corpus\.jsonl: {message}"):
        list(corpus.read_json_lines(tmp_path / "corpus.jsonl", ("_id", "text")))


def test_a_missing_json_lines_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"corpus\.jsonl: cannot be read \(No such file.*A BEIR folder needs this file"):
        list(corpus.read_json_lines(tmp_path / "corpus.jsonl", ("_id",)))


def test_json_lines_give_text_for_every_key(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": 0, "text": "\\ud83d\\ude00", "more": 1}\n\n{"_id": "b", "text": null}\n{"_id": "\u00e4"}\n', "utf-8")
    found = [(row["_id"], row["text"]) for _, row in corpus.read_json_lines(path, ("_id", "text"))]
    assert found == [("0", "\U0001f600"), ("b", ""), ("\u00e4", "")]


QRELS = {
    "two fields": (b"q\td\t1\nq d 1\n", r"line 2 is not 'query-id<TAB>document-id<TAB>grade'\. Mend it"),
    "four fields": (b"q\t0\td\t1\n", r"line 1 is not 'query-id<TAB>"),
    "a fraction": (b"q\td\t1\nq\te\t0.5\n", r"line 2 is not"),
    "not UTF-8": (b"q\td\t1\n\xff\td\t1\n", r"not UTF-8"),
}


@pytest.mark.parametrize("fault", QRELS)
def test_every_fault_of_qrels_is_named(tmp_path: Path, fault: str):
    content, message = QRELS[fault]
    (tmp_path / "test.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test\.tsv: {message}"):
        list(corpus.read_qrels(tmp_path / "test.tsv"))


@pytest.mark.parametrize("header", ["", "query-id\tcorpus-id\tscore\n"])
def test_qrels_are_read_with_or_without_a_header(tmp_path: Path, header: str):
    (tmp_path / "test.tsv").write_text(header + "q\td\t1\nq\te\t-1\n")
    found = [row[1:] for row in corpus.read_qrels(tmp_path / "test.tsv")]
    assert found == [("q", "d", 1), ("q", "e", -1)]


def test_only_a_newline_ends_a_line_of_qrels(tmp_path: Path):
    # str.splitlines would also cut at these, make a header of what stands before, and another id of the rest.
    ids = ["q\u2028x", "q\x85x", "q\x0cx"]
    (tmp_path / "test.tsv").write_bytes("".join(f"{query}\td\t1\r\n" for query in ids).encode())
    assert [row[1:] for row in corpus.read_qrels(tmp_path / "test.tsv")] == [(query, "d", 1) for query in ids]
