"""Texts that nobody wrote: deterministic words, corpora, pairs and BEIR folders, all small."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = tuple(first + second for first in _SYLLABLES[::2] for second in _SYLLABLES[1::3])[:600]
_PAIR_WORDS = 40


def documents(first: int, stop: int, *, num_words: int = 12) -> dict[str, list[Any]]:
    """Returns the columns of documents ``d<first>`` to ``d<stop - 1>``; a document depends on its number alone."""
    numbers = range(first, stop)
    texts = [" ".join(random.Random(number).choices(WORDS, k=num_words)) for number in numbers]
    return {"id": [f"d{number:05d}" for number in numbers], "text": texts}


def write_parquet(path: Path, columns: dict[str, Any], *, row_group_size: int | None = None) -> Path:
    """Writes columns and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_corpus(folder: Path, *, num_files: int = 3, rows_per_file: int = 40, num_words: int = 12) -> Path:
    """Writes ``part-0.parquet`` and so on with consecutive documents, and returns the folder."""
    for number in range(num_files):
        first = number * rows_per_file
        write_parquet(folder / f"part-{number}.parquet", documents(first, first + rows_per_file, num_words=num_words))
    return folder


def pairs(num_pairs: int) -> dict[str, list[str]]:
    """Returns pairs that can be learned: each word of a query has one fixed partner among the words of its document.

    The vocabularies of queries and documents do not meet, so an untrained model cannot know which belong together.
    """
    queries, positives = [], []
    for number in range(num_pairs):
        draw = random.Random(10_000 + number)
        chosen = draw.sample(range(_PAIR_WORDS), k=4)
        queries.append(" ".join(WORDS[word] for word in chosen))
        positives.append(" ".join(WORDS[_PAIR_WORDS + word] for word in draw.sample(chosen, k=4)))
    return {"query": queries, "positive": positives}


def write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Writes one object per line and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_beir(folder: Path, *, num_pairs: int = 60, splits: Sequence[str] = ("train", "test")) -> Path:
    """Writes a BEIR folder whose query ``q<n>`` is answered by document ``d<n>``, dealt out to the splits in turn."""
    made = pairs(num_pairs)
    documents = ({"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(made["positive"]))
    write_json_lines(folder / "corpus.jsonl", documents)
    write_json_lines(folder / "queries.jsonl", ({"_id": f"q{number}", "text": text} for number, text in enumerate(made["query"])))
    (folder / "qrels").mkdir()
    for position, split in enumerate(splits):
        lines = [f"q{number}\td{number}\t1\n" for number in range(position, num_pairs, len(splits))]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), "utf-8")
    return folder


def write_sts(path: Path, *, num_pairs: int = 30) -> Path:
    """Writes scored pairs of sentences in the form of STS-benchmark's own file: the score is the number of shared words."""
    lines = []
    for number in range(num_pairs):
        words = random.Random(20_000 + number).sample(WORDS, k=10)
        score = number % 6
        lines.append(
            f"genre\tfile\t2026\t{number}\t{score}.000\t{' '.join(words[:5])}\t{' '.join(words[5 - score : 10 - score])}\n"
        )
    path.write_text("".join(lines), "utf-8")
    return path
