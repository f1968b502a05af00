"""Long documents cut into windows of whole sentences, counted by the model's own tokenizer. The only room that knows the
splitter.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from matryoshka import storage, units
from matryoshka.storage import Place

_WORD = re.compile(r"\w+")
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How documents are cut.

    Attributes:
        tokenizer: Where the model's ``tokenizer.json`` is.
        num_tokens: Most tokens of a chunk, special tokens not counted.
        overlap: Most tokens that a chunk repeats of the one before it.
    """

    tokenizer: str
    num_tokens: int
    overlap: int


class Chunk(NamedTuple):
    """Characters ``start`` to ``end`` of a document, and what stands there."""

    start: int
    end: int
    text: str

    def id_in(self, document_id: str) -> str:
        """Returns the chunk's id, which leads back to the document and the place in it."""
        return units.chunk_id(document_id, self.start, self.end)


def plan_chunks(folder: Place, max_tokens: int | None, num_tokens: int, overlap: int) -> ChunkPlan:
    """Returns how a model's documents are cut.

    Args:
        folder: The model's.
        max_tokens: The model's window, special tokens included; None where nobody knows.
        num_tokens: See ``ChunkPlan``.
        overlap: See ``ChunkPlan``.

    Raises:
        ValueError: The model has no fast tokenizer, or its window cannot hold so large a chunk.
    """
    path = next(iter(sorted(folder.rglob(_TOKENIZER))), None)
    if path is None:
        raise ValueError(f"{folder}: no {_TOKENIZER}, so tokens cannot be counted. Save the model with its fast tokenizer.")
    num_special = _open(str(path)).num_special_tokens_to_add(is_pair=False)
    if max_tokens and num_tokens + num_special > max_tokens:
        raise ValueError(
            f"--chunk-tokens {num_tokens}: the window of {folder} has {max_tokens} tokens, {num_special} of them special."
            f" Pass at most {max_tokens - num_special}."
        )
    return ChunkPlan(str(path), num_tokens, overlap)


def cut(text: str, plan: ChunkPlan) -> list[Chunk]:
    """Returns the chunks of a text, in order; each is as many whole sentences as fit, and ``text[start:end]`` is its text.

    A sentence that alone is too long is cut between words.
    """
    found = _splitter(plan).chunk_indices(text)
    return [Chunk(start, start + len(chunk), chunk) for start, chunk in found]


@functools.lru_cache(maxsize=1)
def _splitter(plan: ChunkPlan) -> TextSplitter:
    tokenizer = _open(plan.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextSplitter.from_huggingface_tokenizer(tokenizer, plan.num_tokens, plan.overlap)


def _open(tokenizer: str) -> Tokenizer:
    return Tokenizer.from_file(str(storage.local(storage.place(tokenizer))))


def best_chunk(chunks: Sequence[Chunk], query: str) -> Chunk:
    """Returns the chunk that has most of the query's words, the first of several.

    A word counts the less the more chunks have it, so that words that stand everywhere do not decide.
    """
    wanted = _words(query)
    found = [wanted & _words(chunk.text) for chunk in chunks]
    num_chunks = Counter(word for own in found for word in own)
    weights = [sum(sorted(1 / num_chunks[word] for word in own)) for own in found]  # sorted: sets have no order, sums do
    return chunks[weights.index(max(weights))]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))
