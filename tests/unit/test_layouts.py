import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import indexing, layouts
from matryoshka.layouts import Given, Wanted
from matryoshka.nested import FunnelPlan

DIMS = (384, 256, 128, 64, 32)
given_anything = st.builds(
    Given,
    num_documents=st.integers(1, 50_000_000),
    num_shards=st.integers(1, 50),
    dims=st.sampled_from([DIMS, (1024, 512, 64), (64, 16), (8,), (7, 3), (1,)]),
    has_bf16=st.booleans(),
    has_queries=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
)


@given(given_anything)
def test_whatever_there_is_the_choice_can_be_built_and_searched(there: Given):
    choice = layouts.choose(there, Wanted())
    indexing.check_layout(choice.layout, choice.plan, max(there.num_documents, choice.layout.dim))
    assert choice.plan.steps[-1].dim == there.width
    assert not choice.layout.has_index or choice.plan.shortlist.dim == choice.layout.dim
    assert choice.reasons
    assert choice.num_bytes >= 2 * there.width
    assert layouts.choose(there, Wanted()) == choice


@pytest.mark.parametrize(
    ("num_documents", "device", "expected"),
    [
        (1, "cpu", "none"),
        (20_000, "cpu", "none"),
        (20_001, "cpu", "PQ96x4fs"),
        (2_000_000, "cpu", "PQ96x4fs"),
        (4_000_000, "cpu", "IVF8000,PQ96x4fs"),
        (1_000_000, "cuda", "none"),
        (20_000_000, "cuda", "IVF17889,PQ96x4fs"),
    ],
)
def test_the_kind_goes_with_the_number_of_documents_and_the_device(num_documents: int, device: str, expected: str):
    choice = layouts.choose(Given(num_documents, 1, DIMS, device=device), Wanted())
    assert choice.layout.factory == expected


def test_where_bf16_is_fast_coarse_vectors_are_compared_if_they_fit():
    there = Given(2_000_000, 1, DIMS, has_bf16=True)
    assert layouts.choose(there, Wanted()).layout.factory == "dense"
    for more in ({"num_documents": 2_000_001}, {"memory_bytes": 4e9}):
        assert layouts.choose(dataclasses.replace(there, **more), Wanted()).layout.factory != "dense"
    assert layouts.choose(dataclasses.replace(there, num_documents=20_000_000, num_shards=10), Wanted()).layout.factory == "dense"


def test_of_many_lists_a_quarter_is_searched():
    plan = layouts.choose(Given(4_000_000, 1, DIMS), Wanted()).plan
    assert plan.describe() == "192d keep 200 (nprobe 2000) > 384d keep 50"
    forced = layouts.choose(Given(1_000, 1, DIMS), Wanted(factory="IVF64,Flat")).plan
    assert dict(forced.shortlist.parameters) == {"nprobe": 16}


@pytest.mark.parametrize(
    ("there", "space", "dim"),
    [
        ({}, "rotation", 192),
        ({"has_queries": True}, "projection", 192),
    ],
)
def test_the_space_goes_with_the_model_and_the_queries(there: dict, space: str, dim: int):
    layout = layouts.choose(Given(100_000, 1, DIMS, **there), Wanted()).layout
    assert (layout.space, layout.dim, layout.factory) == (space, dim, f"PQ{dim // 2}x4fs")


@given(
    given_anything,
    st.sampled_from([None, "prefix", "rotation"]),
    st.sampled_from([None, "Flat", "HNSW32", "none", "dense", "IVF64,dense"]),
    st.sampled_from([None, "int8", "float16"]),
    st.booleans(),
)
def test_what_is_asked_for_is_given(there: Given, space: str | None, factory: str | None, storage: str | None, has_plan: bool):
    if factory == "none":
        space = None
    plan = FunnelPlan.parse([f"{there.width}:10"]) if has_plan else None
    choice = layouts.choose(there, Wanted(space, None, factory, storage, plan))
    assert choice.layout.space == (space or choice.layout.space)
    assert choice.layout.factory == (factory or choice.layout.factory)
    assert choice.layout.storage == (storage or "float16")
    assert choice.plan == (plan or choice.plan)


def test_a_memory_limit_takes_half_the_room_and_then_the_disk():
    there = Given(1_000_000, 2, DIMS, id_bytes=20)
    found = {}
    for gigabytes in (1, 0.25, 0.1):
        choice = layouts.choose(dataclasses.replace(there, memory_bytes=gigabytes * 1e9), Wanted())
        found[gigabytes] = choice.layout.storage, [reason for reason in choice.reasons if "memory limit" in reason]
    assert found[1] == ("float16", [])
    assert found[0.25] == ("int8", ["vectors as float16 do not fit the memory limit"])
    assert found[0.1][0] == "int8"
    assert "those that are reranked are read from disk" in found[0.1][1][0]


def test_documents_whose_vectors_do_not_fit_are_not_scanned():
    there = Given(20_000, 1, DIMS, memory_bytes=5e6)
    choice = layouts.choose(there, Wanted())
    assert choice.layout.factory == "PQ96x4fs"
    assert "would read the disk" in choice.reasons[0]


def test_a_limit_below_what_must_be_in_memory_names_the_shards_that_help():
    there = Given(1_000_000, 2, DIMS, id_bytes=20, memory_bytes=15e6)
    with pytest.raises(
        ValueError, match=r"--memory-limit 0\.015: .* take 0\.034 GB\. Pass --shards 5 or more, or a smaller"
    ) as error:
        layouts.choose(there, Wanted())
    num_shards = int(str(error.value).partition("--shards ")[2].split()[0])
    assert layouts.choose(dataclasses.replace(there, num_shards=num_shards), Wanted()).layout.has_index


def test_sizes_are_told():
    choice = layouts.choose(Given(250_000, 1, DIMS, id_bytes=20), Wanted())
    assert choice.weigh(250_000) == "about 836 bytes per document (coarse index 48, vector 768, id 20), 0.21 GB in all"
    sizes = [layouts.choose(Given(250_000, 1, DIMS), Wanted(factory=own)).coarse_bytes for own in ("dense", "IVF2000,dense")]
    assert sizes == [2 * 192, 2 * 192 + 4]
