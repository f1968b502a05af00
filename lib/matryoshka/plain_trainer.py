"""Fine-tuning as a plain sentence-transformers script does it, to hold ours against, and the loss that both are judged by.

The script is written as that library's documentation shows it: texts tokenised and padded batch by batch, nothing left out.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers, DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from matryoshka import model
from matryoshka.nested import shrink
from matryoshka.rates import Precision
from matryoshka.recipe import Recipe

_SCALE = 20.0  # of cosines, by which sentence-transformers multiplies them


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """A script: what it trains, on what, and how.

    Attributes:
        base: Folder of the model to start from.
        recipe: What to do; of what concerns only this project's own trainer, nothing is looked at.
        precision: ``bf16`` computes under autocast.
        in_order: Whether batches are consecutive pairs, and the learning rate is the recipe's to the last digit; else the
            script shuffles, keeps texts that are equal apart, and leaves the schedule to its trainer.
    """

    base: Path
    recipe: Recipe
    precision: Precision
    in_order: bool

    def train(
        self, pairs: Mapping[str, Sequence[str]], target: Path, on_step: Callable[[int], None], on_loss: Callable[[float], None]
    ) -> None:
        """Trains, and saves the model.

        Args:
            pairs: Columns ``query`` and ``positive``.
            target: Folder for the model.
            on_step: Called before every step with the number of steps done.
            on_loss: Called with the mean loss of the steps since the last call.
        """
        torch.manual_seed(self.recipe.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = _load(self.base, device, self.recipe)
        network.model_card_data.widget = [{}]  # else the trainer looks for examples, with a progress bar
        loss = MatryoshkaLoss(network, MultipleNegativesRankingLoss(network), matryoshka_dims=list(self.recipe.dims))
        own: dict[str, Any] = {"optimizers": self._optimisers(network)} if self.in_order else {}
        trainer = SentenceTransformerTrainer(
            model=network,
            args=self._arguments(target, network.prompts),
            train_dataset=datasets.Dataset.from_dict({name: list(texts) for name, texts in pairs.items()}),
            loss=loss,
            callbacks=[_Watch(on_step, on_loss)],
            **own,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        network.save_pretrained(str(target), create_model_card=False, safe_serialization=True)

    def _arguments(self, target: Path, prompts: Mapping[str, str]) -> SentenceTransformerTrainingArguments:
        recipe = self.recipe
        by_column = {"query": prompts.get("query"), "positive": prompts.get("document")}
        return SentenceTransformerTrainingArguments(
            output_dir=str(target),
            max_steps=recipe.num_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup,
            batch_sampler=_consecutive if self.in_order else BatchSamplers.NO_DUPLICATES,
            prompts={column: text for column, text in by_column.items() if text} or None,
            bf16=self.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            seed=recipe.seed,
            save_strategy="no",
            logging_steps=recipe.log_steps,
            report_to=[],
            disable_tqdm=True,
        )

    def _optimisers(self, network: Any) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.recipe.learning_rate, weight_decay=0.0, fused=True)
        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, self.recipe.rate_at)


def _load(folder: Path, device: str, recipe: Recipe) -> Any:
    network = model.load(folder, device, dropout=recipe.dropout)
    network.max_seq_length = min(network.max_seq_length or network.tokenizer.model_max_length, recipe.max_tokens or sys.maxsize)
    return network


def held_out_loss(folder: Path, device: str, recipe: Recipe, pairs: Mapping[str, Sequence[str]]) -> float:
    """Returns a model's loss on pairs that it was not trained on, in float32 and without dropout: the mean over whole batches.

    Cross-entropy of each query over the documents of its batch, summed over the recipe's dims.

    Source: Henderson et al. 2017, arXiv:1705.00652, equation 6; Kusupati et al. 2022, arXiv:2205.13147, equation 1.
    """
    network = _load(folder, device, recipe).eval()
    queries = np.asarray(network.encode_query(list(pairs["query"]), show_progress_bar=False))
    documents = np.asarray(network.encode_document(list(pairs["positive"]), show_progress_bar=False))
    losses = []
    for start in range(0, len(queries) - recipe.batch_size + 1, recipe.batch_size):
        rows = slice(start, start + recipe.batch_size)
        total = 0.0
        for dim in recipe.dims:
            scores = torch.from_numpy(_SCALE * shrink(queries[rows], dim) @ shrink(documents[rows], dim).T)
            total += float(torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))))
        losses.append(total)
    return float(np.mean(losses))


def _consecutive(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


class _Watch(TrainerCallback):
    """Tells of steps and losses."""

    def __init__(self, on_step: Callable[[int], None], on_loss: Callable[[float], None]) -> None:
        self._on_step, self._on_loss = on_step, on_loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._on_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            self._on_loss(float(logs["loss"]))
