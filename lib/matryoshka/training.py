"""The fine-tune stage's work: one rank of a distributed run with a Matryoshka loss.

The same function trains alone or as one of several ranks: the process group, where there is one, has been set up around it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback

from matryoshka import model
from matryoshka.encode import Precision
from matryoshka.recipe import Recipe

LOG = "training_log.json"


class _Log(TrainerCallback):
    """Keeps what the trainer reports, and tells a listener."""

    def __init__(self, listener: Any) -> None:
        self.entries: list[dict[str, float]] = []
        self._listener = listener

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            keys = ("loss", "learning_rate", "grad_norm")
            self.entries.append({"step": state.global_step, **{key: float(logs[key]) for key in keys if key in logs}})
            self._listener(self.entries[-1])


def train_rank(
    folder: Path, pairs: Mapping[str, Sequence[str]], recipe: Recipe, precision: Precision, target: Path, listener: Any
) -> None:
    """Trains one rank's replica; rank 0 writes the model and its log to ``target``.

    Args:
        folder: The model to start from.
        pairs: Columns ``query`` and ``positive``, the same on every rank.
        recipe: What to do.
        precision: ``bf16`` computes under autocast; weights and optimiser state stay float32.
        target: A folder of this run's own.
        listener: Called with each log entry on every rank.

    Raises:
        RuntimeError: Steps are missing, or the weights are not finite.
    """
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = model.load(folder, device, dropout=recipe.dropout)
    window = network.max_seq_length
    if recipe.max_tokens and (window is None or recipe.max_tokens < window):
        network.max_seq_length = recipe.max_tokens
    log = _Log(listener)
    trainer = SentenceTransformerTrainer(
        model=network,
        args=_arguments(
            target, recipe, precision, device, num_ranks, {name: prompt or "" for name, prompt in network.prompts.items()}
        ),
        train_dataset=Dataset.from_dict({name: list(pairs[name]) for name in ("query", "positive")}),
        loss=_loss(network, recipe, gather=num_ranks > 1),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if trainer.state.global_step < recipe.num_steps:
        raise RuntimeError(
            f"finetune: only {trainer.state.global_step} of {recipe.num_steps} steps were made: too few batches without a text"
            " twice. Bring more different pairs, or pass a smaller --batch-size."
        )
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise RuntimeError("finetune: the weights are not finite after training. Pass a lower --learning-rate.")
    if trainer.is_world_process_zero():
        network.max_seq_length = window
        network[0].auto_model.config.update(model.dropout_rates(folder))
        network.save_pretrained(str(target), create_model_card=False, safe_serialization=True)
        (target / LOG).write_text(json.dumps(log.entries, indent=1) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _loss(network: Any, recipe: Recipe, *, gather: bool) -> MatryoshkaLoss:
    inner: torch.nn.Module
    if recipe.mini_batch_size:
        inner = CachedMultipleNegativesRankingLoss(network, mini_batch_size=recipe.mini_batch_size, gather_across_devices=gather)
    else:
        inner = MultipleNegativesRankingLoss(network, gather_across_devices=gather)
    # Every dim in every step: with a random choice, ranks would draw different ones.
    return MatryoshkaLoss(network, inner, matryoshka_dims=list(recipe.dims), n_dims_per_step=-1)


def _arguments(
    target: Path, recipe: Recipe, precision: Precision, device: str, num_ranks: int, prompts: dict[str, str]
) -> SentenceTransformerTrainingArguments:
    columns = {"query": prompts.get("query", ""), "positive": prompts.get("document", "")}
    return SentenceTransformerTrainingArguments(
        output_dir=str(target),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=recipe.batch_size // num_ranks,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        seed=recipe.seed,
        prompts={name: prompt for name, prompt in columns.items() if prompt} or None,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_drop_last=True,
        save_strategy="no",
        logging_steps=max(recipe.num_steps // 50, 1),
        report_to=[],
        disable_tqdm=True,
    )
