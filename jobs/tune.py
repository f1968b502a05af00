"""Finds the cheapest plan of an index that holds a floor, on real queries, and keeps the whole frontier with the index."""

from dataclasses import dataclass

from jobs import cluster, embed, measurement
from jobs.entry import RUN_ID, main
from jobs.index import tell_update
from jobs.terminal import say, show_table
from matryoshka import beir, corpus, frontier, metrics, model, storage, tuning, units, vectors
from matryoshka.answers import Answers, Vectors
from matryoshka.config import Field, FolderPath, InputPath, JobSettings, check_settings
from matryoshka.corpus import Columns
from matryoshka.frontier import Point
from matryoshka.indexing import IndexStore
from matryoshka.metrics import Qrels
from matryoshka.pairs import DatasetStore
from matryoshka.storage import Place
from matryoshka.tuning import Tuning
from matryoshka.vectors import EMBEDDING

_SALT = "sample to tune by"  # not the one that halves are dealt with: these would all be of one half


class Settings(JobSettings):
    """Finds the cheapest plan of an index that holds a floor, on real queries, and keeps the whole frontier with the index.

    Where queries are judged, the floor is a share of the nDCG@10 of exact search at full width; where they are not, it is the
    share of the documents of exact search that are found. Half of the queries choose, the other half confirms. The same
    command again does nothing, unless documents or queries changed.
    """

    index: FolderPath = Field(description="Folder that the index job wrote.")
    data: FolderPath | None = Field(None, description="Folder that the prepare job wrote; its chunks have no judgements.")
    beir: FolderPath | None = Field(None, description="BEIR folder, in place of --data.")
    queries: InputPath | None = Field(
        None, description="Queries without judgements, in place of --data: Parquet with texts, or with vectors in 'embedding'."
    )
    split: str = Field("dev", description="Split of --data or --beir whose queries are used.")
    id_column: str = Field("id", description="Column of --queries with the query's id.")
    text_column: str = Field("text", description="Column of --queries with the query's text.")
    floor: float = Field(0.995, gt=0, le=1, description="Least share of exact search that the index's new plan keeps.")
    confidence: float = Field(
        frontier.CONFIDENCE, gt=0, lt=1, description="Of the interval of a plan's share, which must lie at or above the floor."
    )
    results: int = Field(10, ge=1, description="Documents per query that searches will ask for.")
    batch: int = Field(1024, ge=1, description="Queries that are searched at once where plans are timed.")
    max_queries: int = Field(2_000, ge=1, description="Most queries to use; which, their ids decide.")
    model: str | None = Field(None, description="Where the index's model is now, if it was moved.")
    workers: int | None = Field(None, ge=1, description="Most encoder processes; none: one per GPU, or per CPU.")
    dry_run: bool = Field(False, description="Show the frontier, and leave the index as it is.")
    replace: bool = Field(False, description="Measure again, even if nothing changed.")
    run_id: str | None = RUN_ID

    @check_settings
    def _one_source(self) -> "Settings":
        if sum(map(bool, (self.data, self.beir, self.queries))) != 1:
            raise ValueError("give the queries as --data (from the prepare job), --beir or --queries, one of them.")
        return self


@dataclass(frozen=True, slots=True)
class _Queries:
    """Queries as texts or vectors, and which documents answer them, if that is known."""

    ids: list[str]
    texts: list[str]
    vectors: Vectors | None
    qrels: Qrels | None
    fingerprint: str


def run(settings: Settings) -> None:
    """Tunes the index, unless that was done."""
    index = IndexStore.open(storage.place(settings.index))
    tell_update(index)
    if not index.manifest.num_rows:
        raise ValueError(f"{index.folder}: holds no documents. Index some before you tune.")
    queries = _read(settings, index)
    asked = {
        "floor": settings.floor,
        "confidence": settings.confidence,
        "results": settings.results,
        "batch": settings.batch,
        "queries": storage.digest_json([queries.fingerprint, settings.max_queries]),
        "embeddings": index.manifest.inputs["embeddings"],
    }
    if not settings.replace and index.tuned and {name: index.tuned.get(name) for name in asked} == asked:
        say(f"tune: nothing to do, {index.folder} is tuned with these queries ({index.plan.describe()})")
        return
    queries = _choose(queries, settings)
    frontier.choosing(queries.ids)
    found = _tune(index, queries, queries.vectors if queries.vectors is not None else _encode(index, queries, settings), settings)
    report = measurement.begin_report(settings, "cpu")
    if not settings.dry_run:
        words = {"date": report["date"], "hardware": measurement.place_of(report), "split": _split_of(settings)}
        index.keep_tuning({**asked, **words, **found.as_json()})
    _show(found)
    kept = "left as it was" if settings.dry_run else f"now searched with {found.choices['balanced'].point.plan.describe()}"
    say(f"tune: {found.num_trials} plans compared on {len(queries.ids)} queries; {index.folder} is {kept}")


def check_data(settings: Settings, data: DatasetStore) -> None:
    """Checks that a dataset can tune an index, before there is one.

    Raises:
        ValueError: The split has no judged queries, or too few.
    """
    frontier.choosing(_choose(_from_dataset(data, settings.split), settings).ids)


def _read(settings: Settings, index: IndexStore) -> _Queries:
    """Returns the queries that the settings name.

    Raises:
        ValueError: They are not there, have neither texts nor vectors, have no judgements where they should, or belong to
            another model or another corpus.
    """
    if settings.queries:
        return _from_parquet(settings, index)
    info = model.describe_maker(index.folder, index.manifest, settings.model)
    if settings.beir:
        return _from_beir(storage.place(settings.beir), settings.split)
    data = DatasetStore.open(storage.place(settings.data or ""))
    embed.refuse_strangers("--index", index, info, data)
    return _from_dataset(data, settings.split)


def _from_dataset(data: DatasetStore, split: str) -> _Queries:
    ids, texts = data.queries(split)
    fingerprint = storage.digest_json([data.manifest.fingerprint, split])
    if data.is_chunked:
        say(f"tune: {data.folder} is cut into chunks, which nobody judged; the floor is a share of their exact neighbours")
        return _Queries(ids, texts, None, None, fingerprint)
    if split not in data.judged_splits:
        raise ValueError(_without_judgements(data.folder, split))
    return _Queries(ids, texts, None, data.qrels(split), fingerprint)


def _without_judgements(place: Place, split: str) -> str:
    return (
        f"{place}: no query of split '{split}' has judgements. Pass another --split, or pass a file of queries as --queries:"
        " the floor is then a share of the exact neighbours."
    )


def _from_beir(folder: Place, split: str) -> _Queries:
    judged = beir.find_splits(folder)
    if split not in judged:
        raise ValueError(f"{folder}: no judgements for split '{split}' (found: {', '.join(judged)}). Pass --split.")
    qrels = metrics.group_qrels((query, document, grade) for _, query, document, grade in corpus.read_qrels(judged[split]))
    path = folder / beir.QUERIES
    texts = {row["_id"]: row["text"] for _, row in corpus.read_json_lines(path, ("_id", "text")) if row["_id"] in qrels}
    own = {name: text for name, text in texts.items() if text.strip()}
    fingerprint = storage.digest_json([storage.digest_file(file) for file in (path, judged[split])])
    return _Queries([*own], [*own.values()], None, qrels, fingerprint)


def _from_parquet(settings: Settings, index: IndexStore) -> _Queries:
    location = settings.queries or ""
    _, files = corpus.find_files(location)
    if corpus.has_column(files[0], EMBEDDING):
        own = vectors.read_embeddings(files, index.width)
        fingerprint = storage.digest_json([storage.digest_file(path) for path in files])
        corpus.inspect(location, Columns(settings.id_column, settings.id_column))  # every id once
        ids = [*corpus.read_ids(files, settings.id_column)]
        return _Queries(ids, [""] * len(ids), own, None, fingerprint)
    model.describe_maker(index.folder, index.manifest, settings.model)
    source = corpus.inspect(location, Columns(settings.id_column, settings.text_column))
    ids, texts = corpus.read_texts(source)
    return _Queries(ids, texts, None, None, source.fingerprint)


def _choose(queries: _Queries, settings: Settings) -> _Queries:
    """Returns the queries that can be used, and no more than were asked for.

    Raises:
        ValueError: None of them has a document that answers it.
    """
    usable = queries.ids
    if queries.qrels is not None:
        usable = [name for name in queries.ids if any(grade > 0 for grade in queries.qrels.get(name, {}).values())]
        if not usable:
            raise ValueError(_without_judgements(storage.place(settings.data or settings.beir or ""), settings.split))
    wanted = set(units.sample_keys(usable, settings.max_queries, _SALT))
    rows = [row for row, name in enumerate(queries.ids) if name in wanted]
    return _Queries(
        [queries.ids[row] for row in rows],
        [queries.texts[row] for row in rows],
        queries.vectors[rows] if queries.vectors is not None else None,
        queries.qrels,
        queries.fingerprint,
    )


def _encode(index: IndexStore, queries: _Queries, settings: Settings) -> Vectors:
    """Returns the vectors of the queries."""
    info = model.describe_maker(index.folder, index.manifest, settings.model)
    with cluster.connected() as session:
        return session.encode_queries(info, index.manifest.facts["precision"], queries.texts, settings.workers)


def _tune(index: IndexStore, queries: _Queries, query_vectors: Vectors, settings: Settings) -> Tuning:
    call = tuning.open_shards(index)
    if queries.qrels is None:
        exact = index.searcher(index.plan_for("exact"), call)
        answers = Answers.unjudged(exact, query_vectors, settings.results)
    else:
        answers = Answers.judged(index, query_vectors, queries.ids, queries.qrels, settings.results)
    return tuning.tune(index, answers, queries.ids, call, settings.floor, settings.confidence, settings.batch)


def _split_of(settings: Settings) -> str | None:
    return None if settings.queries else settings.split


def _show(found: Tuning) -> None:
    names: dict[Point, list[str]] = {found.exact: ["exact"]}
    for name, choice in found.choices.items():
        names.setdefault(choice.point, []).insert(0, name)
    points = sorted({*found.points, *names}, key=lambda point: -point.queries_per_second)
    header = ["", "plan", "choosing", "confirming", "queries/s", "ms"]
    rows = [[", ".join(names.get(point, [])), *_row(point)] for point in points]
    show_table(f"Plans, fastest first: {found.answers.measure}", [header, *rows], text_columns=(0, 1))
    for name, choice in found.choices.items():
        say(_sentence(name, choice.floor, len(choice.passed_over), choice.point, found.exact))


def _row(point: Point) -> list[str]:
    confirmed = f"{point.confirmed:.4f} ({point.low:.4f}-{point.high:.4f})"
    speed = f"{point.queries_per_second:,.0f}", f"{point.milliseconds:.2f}"
    return [", ".join(point.plan.parts), f"{point.chosen:.4f}", confirmed, *speed]


def _sentence(name: str, floor: float, num_passed: int, point: Point, exact: Point) -> str:
    passed = f"; {num_passed} cheaper held it where they were chosen and were not confirmed" if num_passed else ""
    if point == exact:
        return f"{name} (at least {floor:.4g}): exact search, no faster plan was confirmed{passed}"
    times = point.queries_per_second / exact.queries_per_second
    return f"{name} (at least {floor:.4g}): {point.plan.describe()}, {times:.1f} times as fast as exact search{passed}"


if __name__ == "__main__":
    main("tune", Settings, run, writes="index")
