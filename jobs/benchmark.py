"""Measures this project against other software: the same model, data and machine, one system at a time."""

from typing import Annotated, Any, Literal

from jobs import benchmark_encode, benchmark_finetune, measurement
from jobs.entry import main
from jobs.terminal import say
from matryoshka import storage
from matryoshka.config import Field, InputPath, JobSettings, Metavar, Positional, check_settings

_OWN = {
    "encode": ("corpus", "id_column", "text_column", "documents", "compile"),
    "finetune": ("pairs", "steps", "batch_size", "dims", "max_tokens", "learning_rate", "dropout", "seed"),
}
_NEEDED = {"encode": "corpus", "finetune": "pairs"}


class Settings(JobSettings):
    """Measures this project against other software: the same checkpoint, the same data, the same machine.

    encode: text to vectors, against sentence-transformers, as it comes and tuned, and against int8 runtimes. Runtimes that are
    not installed (extra: bench) are left out, and the report says so. finetune: training steps, against a plain script with
    sentence-transformers' trainer. The systems take turns for some rounds; medians are reported.
    """

    work: Annotated[Literal["encode", "finetune"], Positional("encode|finetune")] = Field(
        description="What to measure: text to vectors, or training."
    )
    output: Annotated[str, Metavar("FILE.json")] = Field(description="JSON file for the report.")
    model: str = Field("minilm", description="Model folder, hub name, or minilm (the demo extra's model).")
    rounds: int = Field(3, ge=1, description="How often each system does the work.")
    device: Literal["cpu", "cuda"] | None = Field(None, description="Where to compute; none: on a GPU if there is one.")
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="Ours, and of trainers; auto: bf16 where a measurement says it pays."
    )
    workers: int | None = Field(
        None, ge=1, description="Our processes; none: one per CPU to encode, one to train, a single one on a GPU."
    )
    corpus: InputPath | None = Field(None, description="encode: Parquet files: a folder, a file, or a glob pattern in quotes.")
    id_column: str = Field("id", description="encode: column with the document's id.")
    text_column: str = Field("text", description="encode: column with the document's text.")
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

    @check_settings
    def _options_of_the_work(self) -> "Settings":
        needed = _NEEDED[self.work]
        if getattr(self, needed) is None:
            raise ValueError(f"benchmark {self.work}: no {needed}. Pass --{needed} PATH.")
        strangers = [name for work, own in _OWN.items() if work != self.work for name in own if name in self.model_fields_set]
        if strangers:
            flag = strangers[0].replace("_", "-")
            raise ValueError(f"--{flag}: says nothing to benchmark {self.work}. Leave it out.")
        return self


def run(settings: Settings) -> dict[str, Any]:
    """Measures, prints a table, writes the report and returns it."""
    work: Any = {"encode": benchmark_encode, "finetune": benchmark_finetune}[settings.work]
    device = measurement.choose_device(settings.device)
    output = measurement.check_output(settings.output)
    report: dict[str, Any] = work.measure(settings, device, output)
    storage.publish_json(output, report)
    work.show(report)
    say(f"benchmark: report in {output}")
    return report


if __name__ == "__main__":
    main("benchmark", Settings, run)
