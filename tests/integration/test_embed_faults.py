"""An embed run meets what a long run meets: killed workers, deadly and poisoned documents, a full disk."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import folders
import numpy as np
import progress
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import texts
import tiny_model
from ray import cloudpickle
from safetensors.numpy import load_file, save_file

from jobs import cluster, embed, verify
from jobs.entry import ExitCode, main
from matryoshka import artifacts
from matryoshka.corpus import Corpus
from matryoshka.storage import remove_leftovers
from matryoshka.units import Unit

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = pytest.mark.usefixtures("local_ray")

_FILES, _ROWS, _UNIT_ROWS = 4, 100, 4
_UNITS = _FILES * _ROWS // _UNIT_ROWS
_DEADLY_SLOT = f"part-{_FILES - 1}.parquet:{_ROWS - _UNIT_ROWS}"
_DOCUMENTS = "num_documents_total"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.write_corpus(tmp_path_factory.mktemp("corpus"), num_files=_FILES, rows_per_file=_ROWS)


def _settings(output: Path, corpus: Path, model: str, **more: Any) -> embed.Settings:
    fixed = {"unit_rows": _UNIT_ROWS, "precision": "float32", "tokens_per_step": 512, "workers": 1}
    return embed.Settings(output=str(output), corpus=str(corpus), model=model, **(fixed | more))


def _flags(settings: embed.Settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.model_dump(exclude_defaults=True).items()]


def _exit_code(settings: embed.Settings, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the exit code of the job's command, run in this process so that it shares its Ray."""
    monkeypatch.setattr(sys, "argv", ["embed", *_flags(settings)])
    with pytest.raises(SystemExit) as ended:
        main("embed", embed.Settings, embed.run)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny: str) -> dict[str, bytes]:
    """The vectors that a run in one go makes."""
    output = tmp_path_factory.mktemp("undisturbed") / "embeddings"
    embed.run(_settings(output, corpus, tiny))
    return folders.vectors(output)


def _find_workers(*, loading: bool = False) -> list[psutil.Process]:
    """Returns the encoder workers of this process's Ray; those that are still loading, if asked for."""
    title = "_EncoderActor.ready" if loading else "_EncoderActor"
    return [process for process in psutil.Process().children(recursive=True) if title in folders.title_of(process)]


def _kill_while_starting(times: int, chance: random.Random) -> None:
    """Ends the one worker again and again while it starts."""
    for _ in range(times):
        folders.wait_until(lambda: bool(_find_workers(loading=True)))
        time.sleep(chance.random())
        _kill_the_worker()


def _kill_the_worker() -> None:
    folders.wait_until(lambda: bool(_find_workers()))  # a process that writes its title has none for a moment
    (worker,) = _find_workers()
    worker.kill()
    folders.wait_until(lambda: not folders.title_of(worker))


def _embed_while_killing(settings: embed.Settings, num_starting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeds while the one worker is ended at a random moment, again and again while it starts, and once more at work."""
    chance = random.Random(5)
    first, last = sorted(chance.sample(range(1, _UNITS * 2 // 3), 2))
    killer = threading.Thread(target=_kill_while_starting, args=(num_starting, chance))

    def kill_and_watch() -> None:
        _kill_the_worker()
        killer.start()

    with monkeypatch.context() as patch:
        moments = progress.interrupt(patch, {first: kill_and_watch, last: _kill_the_worker})
        embed.run(settings)
    killer.join()
    assert not moments, "the worker lived longer than it should"


def test_one_worker_killed_again_and_again_loses_nothing(
    tmp_path: Path, corpus: Path, tiny: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "embeddings"
    _embed_while_killing(_settings(output, corpus, tiny), 2, monkeypatch)
    assert folders.vectors(output) == undisturbed
    verify.run(verify.Settings(folder=str(output)))


@tiny_model.needs_compiler
def test_a_compiled_worker_that_is_killed_comes_back_with_the_same_program(
    tmp_path: Path, corpus: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed.run(_settings(tmp_path / "undisturbed", corpus, tiny, compile="on"))
    output = tmp_path / "embeddings"
    _embed_while_killing(_settings(output, corpus, tiny, compile="on"), 1, monkeypatch)
    assert folders.vectors(output) == folders.vectors(tmp_path / "undisturbed")
    assert all(receipt.details["is_compiled"] for receipt in artifacts.read(output).receipts)
    capsys.readouterr()
    embed.run(_settings(output, corpus, tiny))
    assert "nothing to do" in capsys.readouterr().out, "what was chosen once is chosen again"
    with pytest.raises(ValueError, match="is_compiled: True there"):
        embed.run(_settings(output, corpus, tiny, compile="off"))


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    small_disk: Path,
    corpus: Path,
    tiny: str,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = small_disk / "embeddings"  # there is room for about half of the units
    settings = _settings(output, corpus, tiny)
    assert _exit_code(settings, monkeypatch) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "Make room, then run the same command again" in message
    assert not folders.manifest(output)["is_complete"]
    receipts = artifacts.read_journal(output)
    assert all((output / file.path).stat().st_size == file.num_bytes for receipt in receipts for file in receipt.files)

    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert _exit_code(settings, monkeypatch) == 0
    assert folders.vectors(output) == undisturbed
    verify.run(verify.Settings(folder=str(output)))


class _DeadlyWorker(cluster._EncoderActor):
    """A worker that one unit ends every time, as a document might that no memory is enough for."""

    def embed(self, role: cluster.EncoderRole, source: Corpus, unit: Unit, folder: str) -> artifacts.Receipt:
        if unit.slot == _DEADLY_SLOT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(role, source, unit, folder)


def test_a_unit_that_ends_its_worker_every_time_fails_alone(
    tmp_path: Path,
    corpus: Path,
    tiny: str,
    undisturbed: dict[str, bytes],
    local_ray: cluster.Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "embeddings"
    local_ray.release()
    monkeypatch.setattr(cluster, "_EncoderActor", _DeadlyWorker)
    assert _exit_code(_settings(output, corpus, tiny, attempts=1), monkeypatch) == 1
    local_ray.release()
    remove_leftovers(output)  # of what the worker was writing when it was ended; the next run does that
    message = capsys.readouterr().err
    deadly = f"part-{_FILES - 1}.parquet, rows {_ROWS - _UNIT_ROWS} to {_ROWS}"
    assert f"1 of {_UNITS} units failed ({deadly}: its worker was lost" in message
    finished = folders.vectors(output)
    assert len(finished) == len(undisturbed) - _UNIT_ROWS
    assert finished.items() <= undisturbed.items()


@pytest.fixture
def broken(tmp_path: Path, tiny: str) -> str:
    """The tiny model, with no finite vector for any text that has the word x, as no text of the corpus does."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    word = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]["x"]
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][word] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_poisoned_document_is_named_and_costs_its_own_unit_until_it_is_replaced(
    tmp_path: Path,
    corpus: Path,
    broken: str,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned, output = tmp_path / "corpus", tmp_path / "embeddings"
    shutil.copytree(corpus, poisoned)
    path = poisoned / "part-2.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["text"][30] += " x"
    texts.write_parquet(path, columns)
    settings = _settings(output, poisoned, broken)

    assert _exit_code(settings, monkeypatch) == ExitCode.HOPELESS == 5
    message = capsys.readouterr().err
    assert f"1 of {_UNITS} units failed" in message
    assert "part-2.parquet, rows 28 to 32: the model gave vectors that are not finite" in message
    assert f"'{columns['id'][30]}'" in message
    before = folders.times(output / "units")
    assert len(before) == len(artifacts.read_journal(output)) == _UNITS - 1

    shutil.copy(corpus / "part-2.parquet", path)
    assert _exit_code(settings, monkeypatch) == 0
    after = folders.times(output / "units")
    kept = {name for name in after if after[name] == before.get(name)}
    assert len(kept) == _UNITS - _UNITS // _FILES
    assert folders.vectors(output) == undisturbed
    verify.run(verify.Settings(folder=str(output)))


def _scrape(metric: str) -> dict[str, float]:
    """Returns what each worker says of itself, as Prometheus would see it."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith(f"ray_matryoshka_embed_{metric}{{")]
    return {re.findall(r'WorkerId="(\w+)"', line)[0]: float(line.rpartition(" ")[2]) for line in found}


def test_a_running_cluster_can_be_asked_for_the_documents_done(tmp_path: Path, tiny: str, local_ray: cluster.Session) -> None:
    pytest.importorskip("opencensus", reason="Ray exports metrics only where its extra 'default' is installed")
    num_documents = 37  # as no other worker has: what earlier ones did may be exported only now
    corpus = texts.write_corpus(tmp_path / "corpus", num_files=1, rows_per_file=num_documents)
    local_ray.release()
    embed.run(_settings(tmp_path / "embeddings", corpus, tiny))
    folders.wait_until(lambda: num_documents in _scrape(_DOCUMENTS).values())
    (worker,) = (name for name, count in _scrape(_DOCUMENTS).items() if count == num_documents)
    assert _scrape("memory_bytes")[worker] > 2**26, "any Python with torch takes more"
