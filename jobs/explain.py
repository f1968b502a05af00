"""Says what fine-tuning did to a model: change layer by layer, how its space lies before and after, and a map of both."""

import dataclasses
from typing import Any

from jobs import cluster
from jobs.cluster import Session
from jobs.entry import StageSettings, describe_run, main
from jobs.terminal import say, show_table
from matryoshka import anatomy, artifacts, geometry, model, storage, weights
from matryoshka.anatomy import BASE, TUNED, Anatomy, Sample
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.config import Field, FolderPath, check_settings
from matryoshka.maps import Method
from matryoshka.model import ModelInfo
from matryoshka.pairs import DatasetStore
from matryoshka.storage import Place

_WITHOUT_EFFECT = {"output", "replace", "run_id", "data", "base", "model"}


class Settings(StageSettings):
    """Says what fine-tuning did to a model: how far each layer's weights moved, and what it gives out (CKA); whether pairs lie
    closer and texts are spread more evenly (alignment, uniformity); how much of the variance each prefix holds; how well labels
    are told apart, where there are any (silhouette); and where documents lie on a map before and after.

    All of it is measured on a sample that hashes choose, and written to anatomy.json.
    """

    data: FolderPath = Field(description="Folder that the prepare job wrote.")
    model: str = Field(description="The tuned model: folder or hub name.")
    base: str | None = Field(None, description="The model that it was tuned from; none: the one that it names itself.")
    split: str = Field("test", description="Split whose queries are used.")
    documents: int = Field(800, ge=anatomy.FEWEST_DOCUMENTS, description="Most documents to look at; the map shows them.")
    pairs: int = Field(400, ge=1, description="Most queries of the split, each with a document that answers it.")
    layer_documents: int = Field(400, ge=0, description="Documents that go through the models layer by layer; 0: none do.")
    layer_tokens: int = Field(128, ge=8, description="There, longer documents are cut to so many tokens.")
    map_method: Method = Field("t-SNE", description="How the map is drawn; PCA keeps large distances, t-SNE neighbours.")
    clusters: int = Field(12, ge=2, description="Clusters to colour the map by, where there are no labels.")
    seed: int = Field(7, description="Seed of samples and map.")

    @check_settings
    def _enough_for_layers(self) -> "Settings":
        if 0 < self.layer_documents < geometry.FEWEST_FOR_CKA:
            raise ValueError(f"--layer-documents {self.layer_documents}: too few. Pass {geometry.FEWEST_FOR_CKA} or more, or 0.")
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """What the settings name, checked."""

    data: DatasetStore
    models: dict[str, ModelInfo]
    identity: dict[str, Any]

    @property
    def folders(self) -> list[Place]:
        """The base model's and the tuned one's."""
        return [info.folder for info in self.models.values()]


def run(settings: Settings) -> Manifest:
    """Explains the model, unless the output already holds that."""
    output = storage.place(settings.output)
    inputs = _check(settings, output)
    previous = artifacts.claim(output, "anatomy", inputs.identity, settings.replace)
    if previous and previous.is_complete and not artifacts.find_faults(output, previous):
        say(f"explain: nothing to do, {output} is complete")
        return previous
    sample = Sample.choose(inputs.data, settings.split, settings.documents, settings.pairs, settings.seed)
    manifest = Manifest("anatomy", inputs.identity, facts={"run": describe_run("explain", settings)})
    with cluster.connected() as session:
        artifacts.begin(output, manifest, previous)
        found = _explain(session, settings, inputs, sample)
    storage.publish_json(output / anatomy.NAME, found.as_json())
    record = FileRecord.of(output, output / anatomy.NAME)
    receipts = (Receipt(record.path, len(sample.ids), (record,)),)
    manifest = dataclasses.replace(manifest, receipts=receipts, is_complete=True)
    manifest.write(output)
    _show(found)
    say(f"explain: {output / anatomy.NAME}")
    return manifest


def _check(settings: Settings, output: Place) -> _Inputs:
    """Returns what the settings name.

    Raises:
        ValueError: Something is missing, or the models cannot be compared.
    """
    data, tuned = DatasetStore.open(storage.place(settings.data)), model.describe(settings.model)
    base = model.describe(settings.base or _base_of(tuned))
    storage.keep_apart(output, data.folder, base.folder, tuned.folder)
    before, after = (model.describe_architecture(info.folder) for info in (base, tuned))
    if before != after:
        raise ValueError(
            f"{tuned.folder}: is another architecture than {base.folder} ({after}; {before} there)."
            " Compare a model with the one that it was tuned from."
        )
    if not data.is_chunked:
        data.queries(settings.split)
        data.qrels(settings.split)
    inputs = {"data": data.manifest.fingerprint, "base": base.fingerprint, "model": tuned.fingerprint}
    return _Inputs(data, {BASE: base, TUNED: tuned}, {**inputs, **settings.model_dump(exclude=_WITHOUT_EFFECT)})


def _base_of(tuned: ModelInfo) -> str:
    """Returns where the model was from which another one was tuned.

    Raises:
        ValueError: It is not there any more, or was changed; or this project did not tune the other one.
    """
    if not tuned.is_tuned:
        raise ValueError(f"{tuned.folder}: does not say what it was tuned from. Pass --base.")
    made = artifacts.read_complete(tuned.folder, "model")
    base = str(made.facts["base"])
    folder = storage.place(base)
    if not folder.is_dir() or model.fingerprint(folder) != made.identity["base"]:
        raise ValueError(f"{tuned.folder}: the model that it was tuned from is no longer at {base}. Pass --base.")
    return base


def _explain(session: Session, settings: Settings, inputs: _Inputs, sample: Sample) -> Anatomy:
    """Returns what there is to say."""
    studied = session.study(inputs.folders, sample, settings.layer_documents, settings.layer_tokens)
    (before, states_before), (after, states_after) = studied
    dims = inputs.models[TUNED].dims
    spaces = {BASE: anatomy.describe_space(before, sample, dims), TUNED: anatomy.describe_space(after, sample, dims)}
    changes = weights.measure_changes(*inputs.folders)
    vectors = before.documents, after.documents
    drawn = anatomy.draw_map(sample, *vectors, settings.map_method, settings.clusters, settings.seed)
    layers = anatomy.compare_layers(changes, states_before, states_after)
    return Anatomy(layers, spaces, drawn, _remarks(inputs.data, changes.left_out))


def _remarks(data: DatasetStore, left_out: tuple[str, ...]) -> tuple[str, ...]:
    remarks = ["The corpus is cut into chunks, which nobody judged: there is no alignment."] if data.is_chunked else []
    if left_out:
        remarks.append(f"Weights that only one of the models has, or in another shape, were left out: {', '.join(left_out[:3])}.")
    return tuple(remarks)


def _show(found: Anatomy) -> None:
    rows = [[own.layer, _percent(own.weight_change), _figure(own.cka)] for own in found.layers]
    show_table("What each layer did", [["layer", "weights changed", "CKA"], *rows])
    for sentence in found.sentences:
        say(sentence)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main("explain", Settings, run)
