import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from texts import WORDS
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from matryoshka import calibration
from matryoshka.calibration import Choice
from matryoshka.encode import Encoder

TEXTS = [" ".join(WORDS[number : number + 20]) for number in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", seed=1)


def test_what_is_given_is_kept(folder: Path):
    choice = Choice("float32", 77, is_compiled=True)
    best = calibration.calibrate(folder, "cpu", choice, [], 10**9)
    assert best.choice == choice
    assert best.flops_per_second is not None
    assert best.flops_per_second > 0


def test_what_is_not_given_is_one_of_the_choices(folder: Path):
    best = calibration.calibrate(folder, "cpu", Choice(), TEXTS, num_documents=len(TEXTS))
    assert best.precision in ("float32", "bf16")
    assert best.tokens_per_step in (1_024, 2_048, 4_096)
    assert not best.is_compiled, "so few documents would wait longer for the compiler"


def test_the_fastest_budget_wins(folder: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(folder, "cpu", "float32")
    seconds = {1_024: 3.0, 2_048: 1.0, 4_096: 2.0}
    compute = encoder.compute

    def pretend(*arguments: object) -> object:
        return dataclasses.replace(compute(*arguments), compute_seconds=seconds[encoder.tokens_per_step])

    monkeypatch.setattr(encoder, "compute", pretend)
    assert calibration.best_budget(encoder, "cpu", TEXTS) == 2_048


# A text takes 10 ms, more or less; starting takes what it takes here, some seconds.
@tiny_model.needs_compiler
@pytest.mark.parametrize(
    ("gain", "num_documents", "pays"), [(0.2, 10**6, True), (1e-6, 10**6, False), (-0.2, 10**6, False), (0.2, 1_000, False)]
)
def test_compiling_must_pay_within_the_run(
    gain: float, num_documents: int, pays: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    compute = Encoder.compute

    def pretend(self: Encoder, *arguments: Any) -> Any:
        seconds = 0.01 * arguments[0].num_texts * (1 - gain * self.is_compiled)
        return dataclasses.replace(compute(self, *arguments), compute_seconds=seconds)

    monkeypatch.setattr(Encoder, "compute", pretend)
    best = calibration.calibrate(folder, "cpu", Choice("float32", 512), TEXTS, num_documents)
    assert best.is_compiled == pays


def test_what_kept_the_model_from_being_compiled_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "COMPILING_MAY_PAY_AFTER", 0.0)
    with inductor.patch({"cpp.cxx": ("/no/compiler/here",)}), fresh_cache():
        best = calibration.calibrate(folder, "cpu", Choice("float32", 512), TEXTS, 10**9)
    assert not best.is_compiled
    assert best.notice.startswith("the model is not compiled: ")


def test_a_sample_is_as_large_as_asked_for_or_holds_the_texts_several_times(folder: Path):
    tokens = Encoder(folder, "cpu", "float32").tokenise(TEXTS, "document")
    for wanted in (int(tokens.lengths[:5].sum()), int(tokens.lengths.sum()) * 3):
        sample = calibration._sample(tokens, wanted)
        assert int(sample.lengths.sum()) == len(sample.ids) == wanted
        assert sample.num_texts == len(sample.lengths)


def test_without_documents_nothing_is_compiled(folder: Path):
    assert not calibration.calibrate(folder, "cpu", Choice("float32", 512), [], 10**9).is_compiled
