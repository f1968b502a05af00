"""A real sentence-transformers model, small enough to be made on the spot: random BERT, WordPiece, mean pooling; or its kin."""

import shutil
import string
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from texts import WORDS
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

WIDTH = 64
MAX_TOKENS = 64
ROBERTA_KIN = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their positions start after the padding's number, which is 1
_CONFIGS: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 128},
    "electra": {"embedding_size": 32},
    "modernbert": {"local_attention": 16, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}

_HAS_COMPILER = shutil.which("g++") and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
needs_compiler = pytest.mark.skipif(not _HAS_COMPILER, reason="models are compiled with g++ and Python's headers")


def save(
    folder: Path,
    *,
    seed: int,
    family: str = "bert",
    pooling: str | Sequence[str] = "mean",
    tail: Sequence[Any] = (),
    **config: Any,
) -> Path:
    """Saves a model whose weights depend on the seed alone, and returns its folder.

    Args:
        folder: Where to.
        seed: Of the weights.
        family: Of the transformer, by the name that transformers has for it.
        pooling: Mode or modes.
        tail: Modules after the pooling.
        config: More for the transformer's configuration.
    """
    bare = folder.with_name(f"{folder.name}-bare")
    torch.manual_seed(seed)
    letters = [*string.ascii_lowercase, *string.digits]
    special = ["[CLS]", *_SPECIAL.values()] if family in ROBERTA_KIN else _SPECIAL.values()
    entries = [*special, *letters, *(f"##{letter}" for letter in letters), *WORDS]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    limits = {"vocab_size": len(vocabulary), "max_position_embeddings": MAX_TOKENS + 2 * (family in ROBERTA_KIN)}
    own = {**sizes, **limits, "initializer_range": 0.2, "pad_token_id": vocabulary["[PAD]"], **_CONFIGS.get(family, {}), **config}
    AutoModel.from_config(AutoConfig.for_model(family, **own)).save_pretrained(bare)
    _tokenizer(vocabulary).save_pretrained(bare)
    network = Transformer(str(bare), max_seq_length=MAX_TOKENS)
    pool = Pooling(WIDTH, pooling)  # type: ignore[arg-type]
    SentenceTransformer(modules=[network, pool, *tail], device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def _tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **_SPECIAL)
