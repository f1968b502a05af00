"""What is finished stays finished: a run that was killed ends with the bytes of one that was not."""

import subprocess
import sys
from pathlib import Path

import folders
import progress
import psutil
import pytest
import texts

from jobs import embed, verify
from matryoshka import artifacts

pytestmark = pytest.mark.usefixtures("local_ray")

_FILES, _ROWS, _UNIT_ROWS = 4, 800, 4
_UNITS = _FILES * _ROWS // _UNIT_ROWS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.write_corpus(tmp_path_factory.mktemp("corpus"), num_files=_FILES, rows_per_file=_ROWS, num_words=50)


def _settings(output: Path, corpus: Path, model: str, **more: int) -> embed.Settings:
    return embed.Settings(output=str(output), corpus=str(corpus), model=model, unit_rows=_UNIT_ROWS, precision="float32", **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny: str) -> dict[str, bytes]:
    """The vectors that a run in one go makes."""
    output = tmp_path_factory.mktemp("undisturbed") / "embeddings"
    embed.run(_settings(output, corpus, tiny))
    return folders.vectors(output)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny: str) -> Path:
    """The output of a run whose driver was killed after the first units were recorded."""
    output = tmp_path_factory.mktemp("killed") / "embeddings"
    settings = _settings(output, corpus, tiny, workers=1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.model_dump(exclude_defaults=True).items()]
    log = output.with_name("log.txt")
    with log.open("wb") as sink:
        driver = subprocess.Popen([sys.executable, "-m", "jobs.embed", *flags], stdout=sink, stderr=sink, start_new_session=True)

    def has_recorded() -> bool:
        assert driver.poll() is None, log.read_text()
        return len(list((output / "journal").glob("*.json"))) >= 2

    folders.wait_until(has_recorded)
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in family if "_EncoderActor" in folders.title_of(process)]
    assert workers
    driver.kill()
    driver.wait()
    # Ray ends the workers once the driver is gone; until then they may still write into the output.
    folders.wait_until(lambda: not any(_is_alive(process) for process in workers))
    for process in filter(_is_alive, family):  # Ray's agents would stay for minutes
        process.kill()
    return output


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # where no init process reaps them, orphans stay zombies
    except psutil.NoSuchProcess:
        return False


def test_a_killed_run_is_taken_up_where_it_stood(killed: Path, corpus: Path, tiny: str, undisturbed: dict[str, bytes]) -> None:
    recorded = {f"{receipt.key}.parquet" for receipt in artifacts.read_journal(killed)}
    before = folders.times(killed / "units")
    assert 0 < len(recorded) < _UNITS
    assert not folders.manifest(killed)["is_complete"]

    embed.run(_settings(killed, corpus, tiny))

    after = folders.times(killed / "units")
    assert len(after) == _UNITS
    assert {name for name in after if after[name] == before.get(name)} == recorded
    assert folders.vectors(killed) == undisturbed
    verify.run(verify.Settings(folder=str(killed)))


def test_a_killed_worker_costs_no_document(
    tmp_path: Path, corpus: Path, tiny: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "embeddings"

    def kill_a_worker() -> None:
        workers = [
            process for process in psutil.Process().children(recursive=True) if "_EncoderActor" in folders.title_of(process)
        ]
        workers[0].kill()

    moments = progress.interrupt(monkeypatch, {_UNITS // 20: kill_a_worker})
    embed.run(_settings(output, corpus, tiny))

    assert not moments, "no worker was killed"
    assert folders.vectors(output) == undisturbed
    verify.run(verify.Settings(folder=str(output)))


def test_finished_embeddings_are_left_alone(tmp_path: Path, tiny: str) -> None:
    corpus, output = texts.write_corpus(tmp_path / "corpus"), tmp_path / "embeddings"
    settings = embed.Settings(output=str(output), corpus=str(corpus), model=tiny, unit_rows=10, precision="float32")
    embed.run(settings)
    before = folders.times(output)
    embed.run(settings)
    assert folders.times(output) == before


def test_a_resumed_run_keeps_the_units_it_was_planned_with(tmp_path: Path, tiny: str) -> None:
    corpus, output = texts.write_corpus(tmp_path / "corpus", num_files=1), tmp_path / "embeddings"
    settings = embed.Settings(output=str(output), corpus=str(corpus), model=tiny, unit_rows=10, precision="float32")
    embed.run(settings)
    before = folders.times(output)
    with pytest.raises(ValueError, match=r"unit_rows: 10 there, 20 now.*--replace"):
        embed.run(settings.model_copy(update={"unit_rows": 20}))
    assert folders.times(output) == before
