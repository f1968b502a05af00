"""What nights cost that change little: ``python tests/increments.py reddit/part-*.parquet --output FOLDER``.

A corpus of many files is embedded and indexed; then a file is changed, one added, one removed, and nothing, each followed by the
same two commands. Prints a row of a Markdown table per night: what was embedded, which shards were built, and the seconds.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import folders
import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="Parquet files with id and text")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2_000, help="documents of a file")
    parser.add_argument("--shards", type=int, default=10)
    options = parser.parse_args()
    options.output.mkdir(parents=True)  # or else something is there already
    num_wanted, num_there = (options.files + 2) * options.rows, sum(pq.read_metadata(path).num_rows for path in options.sources)
    if num_there < num_wanted:
        parser.error(f"{num_there:,} documents, and {num_wanted:,} are needed: pass more sources, or smaller --files or --rows")
    corpus = options.output / "corpus"
    tables = _tables(options.sources, options.rows)
    path_of = [corpus / f"part-{number:04d}.parquet" for number in range(options.files + 1)]

    def write(number: int) -> None:
        pq.write_table(next(tables), path_of[number])

    def fill() -> None:
        corpus.mkdir(parents=True)
        for number in range(options.files):
            write(number)

    middle = options.files // 2
    nights: list[tuple[str, Callable[[], None]]] = [
        ("everything is new", fill),
        ("one file changed", lambda: write(middle)),
        ("one file added", lambda: write(options.files)),
        ("one file removed", path_of[0].unlink),
        ("nothing", lambda: None),
    ]
    _say("| night | documents | embedded | share | seconds | shards built | seconds |")
    _say("| --- | --- | --- | --- | --- | --- | --- |")
    for name, change in nights:
        change()
        _say(_night(name, corpus, options))


def _tables(paths: list[Path], num_rows: int) -> Iterator[pa.Table]:
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(num_rows, columns=["id", "text"]):
            yield pa.Table.from_batches([batch])


def _night(name: str, corpus: Path, options: argparse.Namespace) -> str:
    vectors, index = options.output / "embeddings", options.output / "index"
    before = folders.times(vectors / "units"), folders.times(index / "shards")
    embed_seconds = _run("embed", "--corpus", str(corpus), "--model", options.model, "--output", str(vectors))
    index_seconds = _run("index", "--embeddings", str(vectors), "--shards", str(options.shards), "--output", str(index))
    after = folders.times(vectors / "units"), folders.times(index / "shards")
    units, files = ({own for own, stamp in now.items() if was.get(own) != stamp} for was, now in zip(before, after, strict=True))
    built = {Path(own).parts[0] for own in files}
    num_embedded, num_documents = (
        sum(pq.read_metadata(vectors / "units" / own).num_rows for own in names) for names in (units, after[0])
    )
    share = num_embedded / num_documents
    return (
        f"| {name} | {num_documents:,} | {num_embedded:,} | {share:.1%} | {embed_seconds:.0f} |"
        f" {len(built)} of {options.shards} | {index_seconds:.0f} |"
    )


def _run(job: str, *arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"jobs.{job}", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
