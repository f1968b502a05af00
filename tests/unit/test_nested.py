import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from matryoshka import nested
from matryoshka.nested import FunnelPlan, Step, shrink

# Components of like size: among 1e-30 and 1e30, the small one is below what float32 can hold beside the large one.
component = st.one_of(st.just(0.0), st.floats(2**-10, 2**10, width=32), st.floats(-(2**10), -(2**-10), width=32))
vectors = npst.arrays(np.float32, npst.array_shapes(min_dims=2, max_dims=3, max_side=12), elements=component)
parameters = st.dictionaries(st.sampled_from(["nprobe", "efSearch", "ht"]), st.integers(1, 999)).map(
    lambda own: tuple(own.items())
)
plans = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 10_000)), min_size=1, max_size=5).map(
    lambda pairs: FunnelPlan(
        tuple(
            Step(dim, keep)
            for dim, keep in zip(sorted({dim for dim, _ in pairs}), sorted((k for _, k in pairs), reverse=True), strict=False)
        )
    )
)
ROUNDING = 1e-6  # float32 keeps 24 bits, 6e-8; a sum of a dozen squares and a division lose a few of them


@given(vectors, st.data())
def test_shrinking_twice_equals_shrinking_once(full: np.ndarray, data: st.DataObject):
    wide = data.draw(st.integers(1, full.shape[-1]))
    narrow = data.draw(st.integers(1, wide))
    np.testing.assert_allclose(shrink(shrink(full, wide), narrow), shrink(full, narrow), atol=ROUNDING)


@given(vectors, st.data())
def test_shrink_gives_unit_length_and_leaves_a_zero_prefix_zero(full: np.ndarray, data: st.DataObject):
    dim = data.draw(st.integers(1, full.shape[-1]))
    cut = shrink(full, dim)
    assert cut.dtype == np.float32
    assert cut.shape == (*full.shape[:-1], dim)
    is_zero = (full[..., :dim] == 0).all(axis=-1)
    np.testing.assert_allclose(np.linalg.norm(cut.astype(np.float64), axis=-1), np.where(is_zero, 0, 1), atol=ROUNDING)


@given(vectors)
def test_shrink_is_the_same_alone_and_in_company(full: np.ndarray):
    together = shrink(full, full.shape[-1])
    alone = np.stack([shrink(row, row.shape[-1]) for row in full.reshape(-1, full.shape[-1])])
    np.testing.assert_array_equal(together.reshape(alone.shape), alone)


def test_shrink_keeps_the_direction_of_float16_vectors():
    full = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float16)
    expected = full[:, :8].astype(np.float64) / np.linalg.norm(full[:, :8].astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(shrink(full, 8), expected, atol=ROUNDING)


@pytest.mark.parametrize("dim", [0, -1, 9])
def test_shrink_refuses_dims_that_the_vectors_do_not_have(dim: int):
    with pytest.raises(ValueError, match=rf"dim {dim}: vectors have 8 dims\. Choose 1 to 8\."):
        shrink(np.ones((1, 8)), dim)


@given(st.integers(1, 5000))
def test_default_dims_and_plan_fit_every_width(width: int):
    dims = nested.default_dims(width)
    assert nested.check_dims(dims, width, "model") == dims
    plan = nested.default_plan(dims)
    assert plan.steps[-1].dim == width
    assert plan.shortlist.dim in dims


def test_check_dims_orders_them_and_takes_each_once():
    assert nested.check_dims([64, 384, 64, 128], 384, "model") == (384, 128, 64)


@pytest.mark.parametrize(
    ("dims", "message"),
    [([], r"m: no dims.*--dims 384"), ([512, 64], r"m: dims 512 do not fit .* width 384.*1 to 384"), ([64, 0], "m: dims 0")],
)
def test_check_dims_refuses_dims_that_do_not_fit(dims: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        nested.check_dims(dims, 384, "m")


def test_check_dims_refuses_dims_that_a_model_was_not_trained_for():
    assert nested.check_dims([64, 384], 384, "m", declared=(384, 128, 64)) == (384, 64)
    with pytest.raises(ValueError, match=r"m: the model was not trained for 256, 32 dims\. Choose from 384, 128, 64\."):
        nested.check_dims([384, 32, 256], 384, "m", declared=(384, 128, 64))


@given(plans, parameters)
def test_a_plan_is_what_its_parts_say(plan: FunnelPlan, own: tuple[tuple[str, int], ...]):
    assert FunnelPlan.parse([f"{step.dim}:{step.keep}" for step in plan.steps]) == plan
    tuned = FunnelPlan((dataclasses.replace(plan.shortlist, parameters=own), *plan.reranks))
    assert FunnelPlan.parse(tuned.parts) == tuned
    assert (plan.shortlist, *plan.reranks) == plan.steps


@given(plans, st.integers(1, 20_000))
def test_a_plan_for_more_results_keeps_at_least_these_and_its_dims(plan: FunnelPlan, num_results: int):
    stretched = plan.for_results(num_results)
    assert [step.dim for step in stretched.steps] == [step.dim for step in plan.steps]
    assert [step.keep for step in stretched.steps] == [max(step.keep, num_results) for step in plan.steps]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"no steps. Give at least one"),
        (["64"], r"'64' is not dim:keep. Write for example"),
        (["64:x"], r"'64:x' is not dim:keep"),
        (["-4:10"], r"'-4:10' is not dim:keep"),
        (["64:0"], r"64d keep 0 has a number below 1. Give positive numbers"),
        (["64:9:nprobe"], r"'64:9:nprobe' is not dim:keep"),
        (["64:9:nprobe=x"], r"'64:9:nprobe=x' is not dim:keep"),
        (["64:9:nprobe=0"], r"64d keep 9 \(nprobe 0\) has a number below 1"),
        (["64:9", "128:9:nprobe=4"], r"has parameters in a later step\. They belong to the first one"),
        (["64:9", "64:9"], r"does not narrow. Each step needs a larger dim"),
        (["64:9", "128:10"], r"64d keep 9 > 128d keep 10 does not narrow"),
    ],
)
def test_plans_that_do_not_narrow_are_refused(parts: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        FunnelPlan.parse(parts)
