from pathlib import Path

import pytest

from matryoshka import curves, storage
from matryoshka.storage import Place


@pytest.fixture(params=["disk", "bucket"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path if request.param == "disk" else storage.place(request.getfixturevalue("bucket")) / "model"


def test_the_curves_of_a_run_that_went_on_lie_beside_those_of_the_one_before_it(output: Place):
    for step in (1, 2):
        with curves.Curves(output) as drawn:
            drawn.add({"step": step, "loss": 0.5})
    names = storage.names(output)
    assert len(names) == 2
    assert all(name.startswith(f"{curves.FOLDER}/events.") for name in names)


def test_curves_of_a_run_that_failed_are_kept(output: Place):
    def fail() -> None:
        with curves.Curves(output) as drawn:
            drawn.add({"step": 1, "loss": 0.5})
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert len(storage.names(output)) == 1


def test_without_an_output_nothing_is_drawn():
    with curves.Curves(None) as drawn:
        drawn.add({"step": 1, "loss": 0.5})
