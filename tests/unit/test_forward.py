"""The padded model is the oracle: the same vectors, and the same gradients for every parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from texts import WORDS
from torch import Tensor

from matryoshka import forward, model, packed, training
from matryoshka.forward import TrainingForward, features_of

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    WORDS[0],
    " ".join(WORDS[40:52]),  # short of a whole tile
    " ".join(WORDS[80:94]),  # one tile, with the special tokens
    "",
    " ".join(WORDS[120:134]),
    " ".join(WORDS[:80]),  # longer than the model's window
]

Load = Callable[..., Any]
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a model of a family, in training mode, without dropout if not told otherwise; each is made once."""
    root = tmp_path_factory.mktemp("models")

    def made(family: str = "bert", **options: Any) -> Any:
        named = {"pooling": "lasttoken"} | options if family == "qwen3" else options
        folder = root / "-".join([family, *map(str, options.values())])
        if not folder.exists():
            tiny_model.save(folder, seed=3, family=family, **named)
        return model.load(folder, "cpu", dropout=None if options else 0.0).train()

    return made


def features(network: Any, texts: Sequence[str] = TEXTS) -> dict[str, Any]:
    tokens = training.make_tokeniser(network, None)(texts, "document")
    return features_of(tokens.ids, tokens.lengths)


def padded(network: Any, texts: Sequence[str] = TEXTS) -> Tensor:
    """Returns what sentence-transformers itself gives."""
    vectors: Tensor = network(network.preprocess(list(texts)))["sentence_embedding"]
    return vectors


def gradients(network: Any, vectors: Tensor) -> Gradients:
    """Returns the gradient of every parameter, for a loss that depends on each number of the vectors."""
    network.zero_grad(set_to_none=True)
    directions = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5))
    (torch.nn.functional.normalize(vectors.float()) * directions).sum().backward()
    return {name: own.grad for name, own in network.named_parameters() if own.grad is not None}


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Returns how far all gradients together lie apart, as a share of their length."""
    assert found.keys() == wanted.keys()
    left, right = (torch.cat([values[name].ravel() for name in wanted]) for values in (found, wanted))
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("family", packed.FIRST_POSITIONS)
def test_every_family_has_the_vectors_and_gradients_of_its_padded_model(family: str, load: Load):
    network = load(family)
    vectors = padded(network)
    wanted = gradients(network, vectors)
    runs = TrainingForward(network, "float32")
    assert runs.notice == ""
    found = network(features(network))["sentence_embedding"]
    torch.testing.assert_close(found, vectors, atol=1e-5, rtol=1e-4)
    own = gradients(network, found)
    assert own.keys() == wanted.keys()
    whole = torch.cat([value.ravel() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        # Sums in another order, in float32; gradients that are zero but for rounding are held against all of them.
        assert float((own[name] - value).norm()) < 1e-4 * float(value.norm()) + 1e-6 * float(whole), name


def test_sliding_windows_have_the_gradients_of_the_padded_model(load: Load):
    network = load("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    wanted = gradients(network, padded(network))
    TrainingForward(network, "float32")
    assert distance(gradients(network, network(features(network))["sentence_embedding"]), wanted) < 1e-5


@pytest.mark.parametrize("family", ["bert", "mpnet", "roberta"])
def test_in_bf16_gradients_are_as_near_to_those_of_float32_as_the_padded_models_are(family: str, load: Load):
    network = load(family)
    exact = gradients(network, padded(network))
    with torch.autocast("cpu", torch.bfloat16):
        reference = gradients(network, padded(network))
        TrainingForward(network, "bf16")
        found = gradients(network, network(features(network))["sentence_embedding"])
    # Two roundings of the same thing: as far from it as each other, give or take chance.
    assert distance(found, exact) < 1.5 * distance(reference, exact)
    assert distance(found, exact) < 0.2


def test_trained_relative_positions_have_gradients_in_bf16_too(load: Load):
    network = load("mpnet")
    name = next(name for name, _ in network.named_parameters() if "relative_attention_bias" in name)
    exact = gradients(network, padded(network))[name]
    TrainingForward(network, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(network, network(features(network))["sentence_embedding"])[name]
    assert float((found - exact).norm() / exact.norm()) < 0.3


def test_a_batch_over_the_budget_runs_in_steps_and_keeps_its_order(load: Load, monkeypatch: pytest.MonkeyPatch):
    network = load()
    TrainingForward(network, "float32")
    whole = network(features(network))["sentence_embedding"]
    wanted = gradients(network, whole)
    monkeypatch.setitem(forward.TOKENS_PER_STEP, "cpu", 20)
    network = load()
    TrainingForward(network, "float32")
    found = network(features(network))["sentence_embedding"]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
    assert distance(gradients(network, found), wanted) < 1e-5


def test_a_part_of_a_batch_that_gradient_caching_cuts_off_is_read_from_its_bounds(load: Load):
    network = load()
    TrainingForward(network, "float32")
    whole = features(network)
    stop = int(whole["cu_seq_lens_q"][2])
    part = {**whole, "input_ids": whole["input_ids"][:, :stop], "cu_seq_lens_q": whole["cu_seq_lens_q"][:3]}
    torch.testing.assert_close(
        network(part)["sentence_embedding"], network(whole)["sentence_embedding"][:2], atol=1e-5, rtol=1e-4
    )


def test_a_family_that_is_not_known_to_pack_is_padded_and_says_so(load: Load):
    network = load("albert")
    wanted = padded(network)
    runs = TrainingForward(network, "float32")
    assert runs.notice == "batches are padded: models of type 'albert' are not known to pack"
    found = network(features(network))["sentence_embedding"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert distance(gradients(network, found), gradients(network, padded(network))) < 1e-5


def test_a_wrong_first_position_is_noticed_and_batches_are_padded(load: Load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(packed.FIRST_POSITIONS, "roberta", 0)
    network = load("roberta")
    wanted = padded(network)
    assert TrainingForward(network, "float32").notice.startswith("batches are padded: packed vectors differ from padded ones by ")
    torch.testing.assert_close(network(features(network))["sentence_embedding"], wanted, atol=1e-5, rtol=1e-4)


def test_a_model_is_as_it_was_when_training_is_over(load: Load):
    network = load().eval()
    before = network.encode(TEXTS)
    runs = TrainingForward(network, "float32")
    assert not network.training
    np.testing.assert_array_equal(network.encode(TEXTS), before)  # features that are padded already run as they are
    runs.restore()
    assert "forward" not in vars(network)
    np.testing.assert_array_equal(network.encode(TEXTS), before)


ATTENTION_DROPOUT = {
    "bert": "attention_probs_dropout_prob",
    "distilbert": "attention_dropout",
    "modernbert": "attention_dropout",
    "mpnet": "attention_probs_dropout_prob",
    "qwen3": "attention_dropout",
    "roberta": "attention_probs_dropout_prob",
}


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, "float32") for family in ATTENTION_DROPOUT), ("bert", "bf16"), ("mpnet", "bf16")]
)
def test_dropout_of_attention_alone_is_honoured_follows_the_seed_and_ends_with_training(family: str, precision: Any, load: Load):
    others = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
    rates = {ATTENTION_DROPOUT[family]: 0.5} | {name: 0.0 for name in others if name != ATTENTION_DROPOUT[family]}
    network = load(family, **rates)
    TrainingForward(network, precision)

    def vectors(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found: Tensor = network(features(network))["sentence_embedding"].float()
        return found

    first, again, other = vectors(1), vectors(1), vectors(2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)
    network.eval()
    assert torch.equal(vectors(1), vectors(2))
    assert not torch.allclose(first, vectors(1), atol=0.01)


def layout_of(lengths: np.ndarray) -> packed.Layout:
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)
    total = int(lengths.sum())
    return packed.Layout(bounds, int(lengths[0]), total, *packed.group_documents(lengths, total, "cpu"))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_dropout_in_attention_drops_at_its_rate_and_keeps_the_mean(rate: float):
    draw = torch.Generator().manual_seed(1)
    one = [torch.randn(1, 2, 5, 8, generator=draw) for _ in range(3)]
    count = 2_000
    q, k, v = (part.repeat(1, 1, count, 1) for part in one)
    torch.manual_seed(3)
    found, _ = packed.grouped_attention(torch.nn.Module(), q, k, v, None, layout=layout_of(np.full(count, 5)), dropout=rate)
    scores = (one[0] @ one[1].transpose(2, 3) / 8**0.5).softmax(-1)
    wanted = (scores @ one[2])[0].transpose(0, 1)  # [5, H, d]
    samples = found[0].unflatten(0, (count, 5))
    noise = samples.std(0) / count**0.5
    assert ((samples.mean(0) - wanted).abs() < 6 * noise).all()
    num_silent = float((samples == 0).all(-1).float().mean())
    assert num_silent == pytest.approx(rate**5, abs=0.01)
