import pytest

from matryoshka import rates


def test_bf16_must_pay_to_be_chosen(monkeypatch: pytest.MonkeyPatch):
    def pretend(_device: str, precision: rates.Precision, *_: int, **__: int) -> float:
        return {"float32": 1.0, "bf16": ratio}[precision]

    monkeypatch.setattr(rates, "_product_seconds", pretend)
    ratio = 0.9
    assert rates.best_precision("cpu") == "float32"
    ratio = 0.5
    assert rates.best_precision("cpu") == "bf16"


def test_the_matrix_rate_counts_a_multiplication_and_an_addition_per_element(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "_product_seconds", lambda *_, **__: 2.0)
    assert rates.matrix_rate("cpu", "float32", side=10) == 1000.0
