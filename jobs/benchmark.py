"""Measures this project against other software: the same model, data and machine, one system at a time."""

from typing import Annotated, Any, Literal

from jobs import benchmark_encode, benchmark_finetune, benchmark_search, measurement
from jobs.entry import main
from jobs.terminal import say
from matryoshka import storage
from matryoshka.config import Field, FolderPath, InputPath, JobSettings, Metavar, Positional, check_settings

_OWN = {
    "encode": ("corpus", "id_column", "text_column", "documents", "compile"),
    "finetune": ("pairs", "steps", "batch_size", "dims", "max_tokens", "learning_rate", "dropout", "seed"),
    "search": (
        *("index", "queries", "qrels", "beir", "split", "synthetic", "peers", "scale", "shards", "space", "plan"),
        *("coarse_index", "id_column", "text_column"),
    ),
}
_NEEDED = {"encode": "corpus", "finetune": "pairs"}
_OF_BUILDING = ("shards", "space", "plan", "coarse_index")


class Settings(JobSettings):
    """Measures this project against other software: the same checkpoint, the same data, the same machine.

    encode: text to vectors, against sentence-transformers, as it comes and tuned, and against int8 runtimes. Runtimes that are
    not installed (extra: bench) are left out, and the report says so. finetune: training steps, against a plain script with
    sentence-transformers' trainer. search: an index's funnel at several plans, against FAISS's exact search, HNSW, IVF and
    IVF-PQ, hnswlib and usearch over the same vectors, at equal recall; a picture of it lies beside the report. The systems take
    turns for some rounds; medians are reported.
    """

    work: Annotated[Literal["encode", "finetune", "search"], Positional("encode|finetune|search")] = Field(
        description="What to measure: text to vectors, training, or searching."
    )
    output: Annotated[str, Metavar("FILE.json")] = Field(description="JSON file for the report.")
    model: str = Field(
        "minilm",
        description="Model folder, hub name, or minilm (the demo extra's model); search: where the index's model is now.",
    )
    rounds: int = Field(3, ge=1, description="How often each system does the work.")
    device: Literal["cpu", "cuda"] | None = Field(None, description="Where to compute; none: on a GPU if there is one.")
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="Ours, and of trainers; auto: bf16 where a measurement says it pays."
    )
    workers: int | None = Field(
        None, ge=1, description="Our processes; none: one per CPU to encode, one to train, a single one on a GPU."
    )
    corpus: InputPath | None = Field(None, description="encode: Parquet files: a folder, a file, or a glob pattern in quotes.")
    id_column: str = Field("id", description="encode: column with the document's id; search: with the query's.")
    text_column: str = Field("text", description="encode: column with the document's text; search: with the query's.")
    documents: int = Field(
        20_000, ge=1, description="encode: how many rows to take, from the first on; those without text are left out."
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="encode: ours; auto: where a measurement says it pays.")
    pairs: InputPath | None = Field(
        None,
        description="finetune: Parquet files with query and positive: a folder, a file, or a glob pattern in quotes.",
    )
    steps: int = Field(20, ge=1, description="finetune: training steps whose time is taken; a few more go before them.")
    batch_size: int = Field(64, ge=2, description="finetune: pairs per step.")
    dims: tuple[int, ...] = Field((), description="finetune: resolutions; none: full width and the usual ones below it.")
    max_tokens: int | None = Field(None, ge=8, description="finetune: cut longer texts; none: the model's own window.")
    learning_rate: float = Field(5e-5, gt=0, description="finetune: highest learning rate.")
    dropout: float = Field(0.0, ge=0, lt=1, description="finetune: ours, and of the trainer that is measured at equal terms.")
    seed: int = Field(7, description="finetune: seed of the order of pairs, and of dropout.")

    index: FolderPath | None = Field(None, description="search: folder that the index job wrote.")
    queries: InputPath | None = Field(
        None, description="search: Parquet files with the queries' id, and their text or their embedding."
    )
    qrels: Annotated[str | None, Metavar("FILE.tsv")] = Field(
        None, description="search: judgements of --queries, as BEIR has them."
    )
    beir: FolderPath | None = Field(None, description="search: BEIR folder whose queries and judgements are used.")
    split: str = Field("test", description="search: split of --beir.")
    synthetic: Annotated[str | None, Metavar("N:D")] = Field(
        None, description="search: N made-up documents of D dims in place of --index, for example 250000:1024."
    )
    peers: tuple[str, ...] = Field((), description="search: peers to measure beside exact search; none: all.")
    scale: tuple[int, ...] = Field((), description="search: also measure the first so many documents, for example 10000,100000.")
    shards: tuple[int, ...] = Field((1,), description="search: shards of what is built; several go with --scale.")
    space: Literal["auto", "prefix", "rotation"] = Field("auto", description="search: coarse space of what is built.")
    plan: tuple[str, ...] = Field((), description="search: funnel of what is built; its first dim is that of the coarse space.")
    coarse_index: str = Field("auto", description="search: coarse index of what is built, as the index job takes it.")

    @check_settings
    def _options_of_the_work(self) -> "Settings":
        needed = _NEEDED.get(self.work)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"benchmark {self.work}: no {needed}. Pass --{needed} PATH.")
        strangers = [
            name
            for work, own in _OWN.items()
            if work != self.work
            for name in own
            if name in self.model_fields_set and name not in _OWN[self.work]
        ]
        if strangers:
            flag = strangers[0].replace("_", "-")
            raise ValueError(f"--{flag}: says nothing to benchmark {self.work}. Leave it out.")
        return self

    @check_settings
    def _what_to_search(self) -> "Settings":
        if self.work != "search":
            return self
        if (self.index is None) == (self.synthetic is None):
            raise ValueError("benchmark search: give either --index FOLDER or --synthetic N:D.")
        sources = [name for name in ("queries", "beir") if getattr(self, name)]
        if self.index and len(sources) != 1:
            raise ValueError("benchmark search: --index needs its queries as --queries or --beir, one of them.")
        if self.qrels and not self.queries:
            raise ValueError("--qrels judges --queries. Pass both, or --beir alone.")
        if self.synthetic and sources:
            raise ValueError(f"--{sources[0]}: with --synthetic, queries are made as well. Leave it out.")
        return self._what_to_build()

    def _what_to_build(self) -> "Settings":
        given = [name for name in _OF_BUILDING if name in self.model_fields_set]
        if given and not (self.synthetic or self.scale):
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag}: an index that is there is measured as it is. Leave it out, or pass --scale.")
        if not self.shards or min((*self.shards, *self.scale)) < 1:
            raise ValueError("--shards, --scale: a number below 1, or none. Give positive numbers.")
        if len(self.shards) > 1 and not self.scale:
            raise ValueError("--shards: several numbers go with --scale. Pass one, or --scale.")
        return self


def run(settings: Settings) -> dict[str, Any]:
    """Measures, prints a table, writes the report and returns it."""
    work: Any = {"encode": benchmark_encode, "finetune": benchmark_finetune, "search": benchmark_search}[settings.work]
    device = measurement.choose_device(settings.device)
    output = measurement.check_output(settings.output)
    report: dict[str, Any] = work.measure(settings, device, output)
    storage.publish_json(output, report)
    work.show(report)
    say(f"benchmark: report in {output}")
    return report


if __name__ == "__main__":
    main("benchmark", Settings, run, writes=None)
