import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from matryoshka import checkpoints, storage
from matryoshka.storage import Place

if TYPE_CHECKING:
    from faulty_proxy import Proxy

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = "this run"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.free, self.frozen = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        self.frozen.requires_grad_(requires_grad=False)


def made(seed: int = 0) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = Small()
    return network, torch.optim.AdamW([own for own in network.parameters() if own.requires_grad], lr=0.1, fused=True)


def step(network: Small, optimiser: torch.optim.Optimizer, number: int) -> None:
    inputs = torch.from_numpy(np.random.default_rng(number).standard_normal((4, 3))).float()
    network.free(inputs).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def write(folder: Place, number: int, identity: str = RUN, **notes: Any) -> None:
    """Writes the checkpoint of a step of another model each."""
    network, optimiser = made(number)
    step(network, optimiser, number)
    checkpoints.write_step(folder, network, optimiser, number, {"identity": identity, **notes})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_and_the_optimisers_state_come_back_as_they_were(tmp_path: Path):
    network, optimiser = made()
    for number in range(3):
        step(network, optimiser, number)
    checkpoints.write_step(tmp_path, network, optimiser, 3, {"identity": RUN, "more": [1.5, None]})
    found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    assert (found.step, found.notes["more"]) == (3, [1.5, None])
    restored, its_optimiser = made(seed=1)
    found.load(restored, its_optimiser)
    for number in range(3, 5):
        step(network, optimiser, number)
        step(restored, its_optimiser, number)
    for own, other in zip(network.free.parameters(), restored.free.parameters(), strict=True):
        assert torch.equal(own, other)
        assert optimiser.state[own].keys() == its_optimiser.state[other].keys()
        assert all(torch.equal(value, its_optimiser.state[other][kind]) for kind, value in optimiser.state[own].items())


def test_only_what_is_trained_is_written(tmp_path: Path):
    write(tmp_path, 1)
    restored, optimiser = made(seed=9)
    before = restored.frozen.weight.clone()
    found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    found.load(restored, optimiser)
    assert torch.equal(restored.frozen.weight, before)


def test_the_last_two_checkpoints_are_kept_and_the_last_is_taken(tmp_path: Path):
    for number in (1, 2, 10):
        write(tmp_path, number)
    assert names(tmp_path) == ["step-00000002", "step-00000010"]
    found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    assert found.step == 10


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimiser.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_is_taken(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for number in (1, 2):
        write(tmp_path, number)
    damage(tmp_path / "step-00000002" / name)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    assert found.step == 1
    assert caplog.messages == [f"{tmp_path / 'step-00000002'}: a damaged checkpoint is passed over"]


@pytest.mark.parametrize("missing", ["state.json", "weights.safetensors", "optimiser.safetensors"])
def test_a_checkpoint_that_is_half_there_in_a_bucket_is_passed_over(
    missing: str, s3: "Proxy", bucket: str, caplog: pytest.LogCaptureFixture
):
    folder = storage.place(bucket) / "checkpoints"
    for number in (1, 2):
        write(folder, number)
    assert [request.path for request in s3.requests if request.method == "PUT"][-1].endswith("/step-00000002/state.json")
    whole = checkpoints.latest(folder, RUN)
    assert whole is not None
    assert whole.step == 2
    whole.load(*made())
    storage.remove(folder / "step-00000002" / missing)
    found = checkpoints.latest(folder, RUN)
    assert found is not None
    assert found.step == 1
    assert caplog.messages == [f"{folder}/step-00000002: a damaged checkpoint is passed over"]


def test_a_state_that_is_json_but_no_state_is_damaged(tmp_path: Path):
    write(tmp_path, 1)
    for content in ("[]", "{}", '{"digest": 1}', "null", '"text"'):
        (tmp_path / "step-00000001" / "state.json").write_text(content)
        assert checkpoints.latest(tmp_path, RUN) is None


def test_a_damaged_checkpoint_does_not_outlive_the_ones_that_follow(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 20)
    flip(tmp_path / "step-00000020" / "weights.safetensors")
    write(tmp_path, 5)
    assert names(tmp_path) == ["step-00000001", "step-00000005"]


def test_a_checkpoint_that_was_being_written_when_its_writer_was_killed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 1)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    (tmp_path / f"{storage.TEMPORARY}0123-step-00000003").mkdir()
    found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    assert found.step == 1


def test_without_checkpoints_there_is_none(tmp_path: Path):
    assert checkpoints.latest(tmp_path / "nothing", RUN) is None


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path):
    write(tmp_path, 4, identity="another run")
    with pytest.raises(
        ValueError, match=r"step-00000004: a checkpoint of another model, other data or another recipe.*--replace"
    ):
        checkpoints.latest(tmp_path, RUN)


def test_the_best_weights_stay_as_long_as_a_checkpoint_speaks_of_them(tmp_path: Path):
    network, _ = made()
    for best_step in (0, 3, 6):
        checkpoints.write_best(tmp_path, network, best_step, {"identity": RUN})
        write(tmp_path, best_step + 1, best_step=best_step)
    assert names(tmp_path) == ["best-00000003", "best-00000006", "step-00000004", "step-00000007"]
    write(tmp_path, 8, best_step=6)
    assert names(tmp_path) == ["best-00000006", "step-00000007", "step-00000008"]
    assert checkpoints.best(tmp_path, 3, RUN) is None


def test_best_weights_are_loaded_without_an_optimiser_and_verified(tmp_path: Path):
    network, _ = made(1)
    checkpoints.write_best(tmp_path, network, 2, {"identity": RUN})
    found = checkpoints.best(tmp_path, 2, RUN)
    assert found is not None
    other, _ = made(2)
    found.load(other)
    assert torch.equal(other.free.weight, network.free.weight)
    flip(tmp_path / "best-00000002" / "weights.safetensors")
    assert checkpoints.best(tmp_path, 2, RUN) is None


def test_weights_that_do_not_arrive_as_they_were_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 1)
    found = checkpoints.latest(tmp_path, RUN)
    assert found is not None
    load = checkpoints.load_file
    monkeypatch.setattr(checkpoints, "load_file", lambda path: {name: value + 1 for name, value in load(path).items()})
    with pytest.raises(RuntimeError, match=r"step-00000001: the weights that were loaded are not those that were written"):
        found.load(made()[0])


def test_equal_weights_have_equal_digests_and_others_have_others():
    one, two = {"a": torch.ones(3), "b": torch.zeros(2)}, {"b": torch.zeros(2), "a": torch.ones(3)}
    assert checkpoints.digest_of(one) == checkpoints.digest_of(two)
    assert checkpoints.digest_of({**one, "a": torch.ones(3) + 1e-6}) != checkpoints.digest_of(one)
    assert checkpoints.digest_of({"a": one["a"], "c": one["b"]}) != checkpoints.digest_of(one)
