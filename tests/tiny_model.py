"""A real sentence-transformers model, small enough to be made on the spot: random BERT, WordPiece, mean pooling."""

import string
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from texts import WORDS
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WIDTH = 64
_MAX_TOKENS = 64
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def save(folder: Path, *, seed: int) -> Path:
    """Saves a model whose weights depend on the seed alone, and returns its folder."""
    bare = folder.with_name(f"{folder.name}-bare")
    torch.manual_seed(seed)
    letters = [*string.ascii_lowercase, *string.digits]
    entries = [*_SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), *WORDS]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=_MAX_TOKENS,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(bare)
    _tokenizer(vocabulary).save_pretrained(bare)
    network = Transformer(str(bare), max_seq_length=_MAX_TOKENS)
    SentenceTransformer(modules=[network, Pooling(WIDTH, "mean")], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )
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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_MAX_TOKENS, **_SPECIAL)
