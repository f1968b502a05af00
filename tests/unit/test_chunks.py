from pathlib import Path

import datasets_by_hand as datasets
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from matryoshka import artifacts, chunks, preparation
from matryoshka.chunks import Chunk, ChunkPlan
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.model import ModelInfo
from matryoshka.preparation import Finishing
from matryoshka.splits import SplitRule

some_text = st.text(st.sampled_from("ab .!?\n\u00e4\u6f22\U0001f600e\u0301\u200d\u2028"), max_size=120)


@pytest.fixture(scope="module")
def plan(minilm: ModelInfo) -> ChunkPlan:
    return chunks.plan_chunks(minilm.folder, minilm.max_tokens, 12, 4)


def count_tokens(plan: ChunkPlan, text: str) -> int:
    tokenizer = Tokenizer.from_file(plan.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


@settings(max_examples=60, deadline=None)
@given(some_text)
def test_a_chunk_is_what_stands_between_its_offsets_and_none_is_too_long(plan: ChunkPlan, text: str):
    found = chunks.cut(text, plan)
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in found)
    assert all(count_tokens(plan, chunk.text) <= 12 for chunk in found)
    assert [chunk.start for chunk in found] == sorted({chunk.start for chunk in found})


@settings(max_examples=60, deadline=None)
@given(some_text)
def test_no_character_but_white_space_is_lost(plan: ChunkPlan, text: str):
    covered = {place for chunk in chunks.cut(text, plan) for place in range(chunk.start, chunk.end)}
    assert all(text[place].isspace() for place in range(len(text)) if place not in covered)


def test_chunks_are_whole_sentences_that_overlap(plan: ChunkPlan):
    text = "The cat sat down. It was tired. The dog ran off. It was awake. The bird sang on."
    found = [chunk.text for chunk in chunks.cut(text, plan)]
    assert len(found) > 1
    assert all(own.endswith(".") for own in found)
    assert found[0].endswith("It was tired.")
    assert found[1].startswith("It was tired.")


def test_the_chunk_that_shares_most_words_is_the_first_of_equals():
    found = [Chunk(0, 1, "a dog"), Chunk(2, 3, "The CAT, a bird"), Chunk(4, 5, "bird and cat")]
    assert chunks.best_chunk(found, "cat bird?").start == 2
    assert chunks.best_chunk(found, "nothing of it").start == 0


def test_words_that_stand_everywhere_do_not_decide():
    found = ["what is the use of it", "what is the one of no use", "what is it", "leukemia, the use of a drug"]
    own = [Chunk(start, start + 1, text) for start, text in enumerate(found)]
    assert chunks.best_chunk(own, "What is the use of leukemia?").start == 3


def test_chunked_data_leads_back_to_documents_and_judges_documents(tmp_path: Path, plan: ChunkPlan):
    long = "The cat sat down. It was tired. The dog ran off. It was awake. The bird sang on."
    path = texts.write_parquet(tmp_path / "in.parquet", {"query": ["which bird sang?", "who?"], "positive": [long, "Nobody."]})
    rules = Rules(SplitRule("hash", {"train": 1.0}, "salt"))
    source = preparation.from_pairs([path], PairColumns("query", "positive"), rules)
    store = datasets.prepare(source, tmp_path / "out", rules, Finishing(plan))
    assert store.is_chunked
    rows = datasets.columns_of(sorted(Path(store.corpus).iterdir()))
    documents = {document for grades in store.qrels("train").values() for document in grades}
    assert set(rows["document_id"]) == documents
    for name, text, document, start, end in zip(*rows.values(), strict=True):
        assert name == f"{document}#{start}-{end}"
        assert text in (long[start:end], "Nobody.")
    pairs = datasets.columns_of(store.pair_files())
    assert [text.endswith("The bird sang on.") or text == "Nobody." for text in pairs["positive"]] == [True, True]
    assert set(pairs["document_id"]) <= set(rows["id"])
    assert store.manifest.facts["chunks"] == len(rows["id"]) > store.manifest.facts["documents"] == 2
    assert artifacts.find_faults(store.folder, store.manifest) == []


def test_negatives_that_the_data_brings_are_chunks_as_the_positive_is(tmp_path: Path, plan: ChunkPlan):
    long = "The cat sat down. It was tired. The dog ran off. It was awake. The bird sang on."
    rows = {"query": ["which bird sang?", "who ran?"], "positive": ["Nobody.", long], "negatives": [[long], []]}
    path = texts.write_parquet(tmp_path / "in.parquet", rows)
    rules = Rules(SplitRule("hash", {"train": 1.0}, "salt"))
    source = preparation.from_pairs([path], PairColumns("query", "positive", "negatives"), rules)
    store = datasets.prepare(source, tmp_path / "out", rules, Finishing(plan))
    pairs = datasets.columns_of(store.pair_files())
    (negative,), (name,) = (pairs[column][pairs["positive"].index("Nobody.")] for column in ("negatives", "negative_ids"))
    chunk_of = datasets.columns_of(sorted(Path(store.corpus).iterdir()))
    assert dict(zip(chunk_of["id"], chunk_of["text"], strict=True))[name] == negative
    assert negative.endswith("The bird sang on.")
    assert len(negative) < len(long)


def test_a_chunk_beyond_the_window_is_refused(minilm: ModelInfo):
    with pytest.raises(ValueError, match=r"--chunk-tokens 255: the window of .* has 256 tokens, 2 of them special.*at most 254"):
        chunks.plan_chunks(minilm.folder, 256, 255, 0)
    assert chunks.plan_chunks(minilm.folder, 256, 254, 0).num_tokens == 254


def test_a_model_without_a_fast_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no tokenizer\.json, so tokens cannot be counted\. Save the model"):
        chunks.plan_chunks(tmp_path, None, 10, 0)
