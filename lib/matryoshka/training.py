"""The fine-tune stage's work: one rank of a distributed run with a Matryoshka loss.

The same function trains alone or as one of several ranks: the process group, where there is one, has been set up around it.
sentence-transformers' trainer steps; what it steps over (packed batches, fixed by the step's number alone) and where it begins
(the last checkpoint) are decided here, so that a run that was killed ends with the weights of one that was not.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from matryoshka import batches, checkpoints, examples, layers, losses, model, storage
from matryoshka.batches import BatchPlan
from matryoshka.dev import DEV, DevEvaluator, DevSet
from matryoshka.examples import Examples
from matryoshka.forward import TrainingForward, features_of
from matryoshka.rates import Precision
from matryoshka.recipe import Recipe
from matryoshka.storage import Place
from matryoshka.stream import Fetch, put
from matryoshka.tokens import Role, Tokeniser, Tokens

_SHOWN_PAIRS = 3
_NOTED = ("entries", "best_step", "best_score", "num_worse", "stopped_at", "loss_sum", "num_summed")


class Observer(Protocol):
    """What a run tells, and whom it asks, on the way; every rank has one."""

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Learns what the run is about to do: tokens per step, trained numbers by layer group, steps that are done."""

    def log(self, entry: Mapping[str, float]) -> None:
        """Takes an entry of the log: ``step``, and the loss or the dev split's figures."""

    def wants_checkpoint(self, step: int) -> bool:
        """Returns whether the run, or a machine of it, is about to be lost; asked after every step."""

    def before_writing(self) -> None:
        """Returns if this process is still the one to write; raises if another has taken its place, as it was given up."""

    def checkpointed(self, step: int) -> None:
        """Learns that this rank has written the checkpoint of a step."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank works on; the same on every rank.

    Attributes:
        base: Folder of the model to start from.
        parts: Folders of tokenised pairs.
        pair_files: The files that they were made from, for messages.
        recipe: What to do.
        precision: ``bf16`` computes under autocast; weights and optimiser state stay float32.
        identity: Of base, data and recipe; a checkpoint of another one is refused.
        output: Folder of the run: its checkpoints go below it.
        target: Where rank 0 writes the model and the log of the run.
        device: ``cpu`` or ``cuda``.
        dev: What the model is measured on while it is trained; None: the last step's weights are kept.
    """

    base: Place
    parts: tuple[Place, ...]
    pair_files: tuple[Place, ...]
    recipe: Recipe
    precision: Precision
    identity: str
    output: Place
    target: Place
    device: str = "cpu"
    dev: DevSet | None = None

    def autocast(self) -> torch.autocast:
        """Returns the precision that vectors are computed in, as a block."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def checkpoints(self) -> Place:
        """Where checkpoints are."""
        return self.output / model.CHECKPOINTS


class TrainingError(RuntimeError):
    """What a training run says of itself: the same run would fail again, whatever machine it is on."""


def make_tokeniser(network: Any, max_tokens: int | None) -> Tokeniser:
    """Returns the model's tokeniser with its prompts, cut to ``max_tokens`` where that is less than its window."""
    window = int(network.max_seq_length or network.tokenizer.model_max_length)
    prompts = {role: text for role, text in network.prompts.items() if text}
    cut = network.tokenizer.truncation_side
    return Tokeniser(model.rust_tokenizer(network), min(window, max_tokens or window), prompts, "truncate", cut)


def train_rank(job: Job, observer: Observer) -> None:
    """Trains one rank's replica; rank 0 writes the model and the log of the run.

    Raises:
        ValueError: A checkpoint in the output is of another run, or the recipe does not fit the model or the pairs.
        TrainingError: The loss or the weights are not finite, or memory ran out.
    """
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    torch.manual_seed(job.recipe.seed)
    network: Any = model.load(job.base, job.device, dropout=job.recipe.dropout)
    pairs = Examples.open(job.parts, job.recipe.num_negatives)
    if not job.recipe.num_negatives and len(np.unique(pairs.columns["positive"].keys)) < 2:
        raise ValueError("finetune: all pairs have the same positive, so no query has a negative. Bring pairs that differ.")
    layers.choose(network, job.recipe)
    forward = TrainingForward(network, job.precision)
    with job.autocast():
        layers.freeze_unused(network, lambda: _embed(network, *pairs.columns["query"].take(np.arange(min(len(pairs), 2)))))
    run = _Run(job, network, pairs, num_ranks, observer)
    run.notices += [forward.notice] * bool(forward.notice)
    try:
        run.train()
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"finetune: memory ran out with {job.recipe.batch_size // num_ranks} pairs per rank."
            " Pass --mini-batch-tokens (65536, say) to hold so many tokens at once, or a smaller --batch-size."
        ) from None
    run.keep_best()
    forward.restore()
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise TrainingError("finetune: the weights are not finite after training. Pass a lower --learning-rate.")
    if run.is_first:
        observer.before_writing()
        _save(network, job, run.summary())
    if num_ranks > 1:
        torch.distributed.barrier()


def _embed(
    network: Any, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], extras: Mapping[str, int] | None = None
) -> Tensor:
    features = {name: _put(value, network.device) for name, value in features_of(ids, lengths, extras).items()}
    vectors: Tensor = network(features)["sentence_embedding"]
    return vectors


def _put(value: Any, device: torch.device) -> Any:
    return put(value, device) if isinstance(value, Tensor) else value


def _save(network: Any, job: Job, summary: Mapping[str, Any]) -> None:
    """Writes a plain sentence-transformers folder: weights as safetensors, the model's own window and dropout rates."""
    if job.recipe.lora_rank:
        layers.merge_low_rank(network)
    network[0].auto_model.config.update(model.dropout_rates(job.base))
    with storage.publish(job.target) as temporary:
        network.save_pretrained(str(temporary), create_model_card=False, safe_serialization=True)
        (temporary / model.TRAINING_LOG).write_text(json.dumps(summary, indent=1) + "\n")
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # written for its owner only, but other users of the cluster load it


@dataclass(frozen=True, slots=True)
class _Batches:
    """The batches of one rank from some step on, as the trainer takes them."""

    pairs: Examples
    plan: BatchPlan
    rank: int
    num_ranks: int
    first_step: int
    num_steps: int
    lengths: npt.NDArray[np.int64]
    extras: Mapping[Role, Mapping[str, int]]

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.plan.batches(self.first_step, self.num_steps):
            dealt = rows[batches.deal(self.lengths[rows], self.num_ranks)]  # [W, B / W]
            own = dealt[self.rank]
            batch: dict[str, Any] = {"rows": rows, "mask": torch.from_numpy(self.pairs.mask(own, dealt.ravel()))}
            for name, column in self.pairs.columns.items():
                features = features_of(*column.take(own), self.extras["query" if name == "query" else "document"])
                batch |= {f"{name}_{key}": value for key, value in features.items()}
            yield batch


class _Trainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer over batches that are made already.

    Args:
        data: The batches.
        scores: Of the loss; it is told what to leave out.
        on_loss: Gets the rows of each batch, and its loss.
        named: As the trainer's own.
    """

    def __init__(self, data: _Batches, scores: losses.MaskedScores, on_loss: Callable[[Any, Tensor], None], **named: Any) -> None:
        super().__init__(**named)
        self._data, self._scores, self._on_loss = data, scores, on_loss

    def get_train_dataloader(self) -> Any:
        """Returns the batches."""
        return self._data

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a batch on the device, without waiting for it to be there."""
        return {name: _put(value, self.args.device) for name, value in inputs.items()}

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """Returns the loss of one batch."""
        rows = inputs.pop("rows")
        self._scores.begin(inputs.pop("mask"))
        loss: Any = super().compute_loss(model, inputs, *arguments, **named)
        self._on_loss(rows, loss.detach())
        return loss


@dataclass(slots=True)
class _Run:
    """One rank's run: where it begins, what it notes on the way, what it keeps."""

    job: Job
    network: Any
    pairs: Examples
    num_ranks: int
    observer: Observer
    entries: list[dict[str, float]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    best_step: int | None = None
    best_score: float = -1.0
    num_worse: int = 0
    stopped_at: int | None = None
    loss_sum: Any = 0.0
    num_summed: int = 0
    last: tuple[int, Any, Fetch] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return torch.distributed.get_rank() if self.num_ranks > 1 else 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def train(self) -> None:
        """Takes the steps that no checkpoint has."""
        recipe, network = self.job.recipe, self.network
        plan = BatchPlan(len(self.pairs), recipe.batch_size, recipe.seed, self.pairs.labels)
        lengths = self.pairs.lengths
        self.facts = {
            "steps_per_epoch": plan.steps_per_epoch,
            "tokens_per_step": round(float(lengths.mean()) * recipe.batch_size),
            "trainable": layers.count_trainable(network),
            "num_ranks": self.num_ranks,
        }
        extras = {role: model.prompt_extras(network, network.prompts.get(role)) for role in get_args(Role)}
        optimiser = torch.optim.AdamW(layers.optimiser_groups(network, recipe), weight_decay=0.0, fused=True)
        first_step = self.facts["first_step"] = self._resume(optimiser)
        if self.is_first:
            self.observer.begin(self.facts)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: recipe.rate_at(first_step + step))
        if first_step >= recipe.num_steps or self.stopped_at is not None:
            return
        data = _Batches(self.pairs, plan, self.rank, self.num_ranks, first_step, recipe.num_steps, lengths, extras)
        scores = losses.MaskedScores()
        watch = _Watch(self, optimiser, first_step, extras)
        trainer = _Trainer(
            data,
            scores,
            watch.take_loss,
            model=network,
            args=_arguments(self.job, recipe.num_steps - first_step, self.num_ranks),
            loss=losses.build(network, recipe, scores, self.num_ranks),
            optimizers=(optimiser, scheduler),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.check_loss()

    def _resume(self, optimiser: torch.optim.Optimizer) -> int:
        """Takes up the last checkpoint, the same on every rank; returns how many steps are done.

        Raises:
            RuntimeError: The checkpoint that the first rank found is not there, or not whole, for this one.
        """
        found = checkpoints.latest(self.job.checkpoints, self.job.identity) if self.is_first else None
        shared: list[Any] = [found.folder if found else None]
        if self.num_ranks > 1:  # each for itself, ranks might see different ones on a shared disk
            torch.distributed.broadcast_object_list(shared)
        if shared[0] is None:
            return 0
        found = found or checkpoints.read(shared[0], self.job.identity)
        if found is None:
            raise RuntimeError(f"{shared[0]}: a checkpoint that another rank sees is not whole here. Do all nodes mount it?")
        found.load(self.network, optimiser)
        for name in _NOTED:
            setattr(self, name, found.notes[name])
        return found.step

    def write_checkpoint(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Writes a checkpoint, on the rank that writes."""
        self.check_loss()
        if self.is_first:
            self.observer.before_writing()
            checkpoints.write_step(self.job.checkpoints, self.network, optimiser, step, self._notes())
            self.observer.checkpointed(step)

    def _notes(self) -> dict[str, Any]:
        noted = {name: getattr(self, name) for name in _NOTED}
        return {"identity": self.job.identity, **noted, "loss_sum": float(self.loss_sum)}

    def take_loss(self, step: int, rows: Sequence[int], loss: Tensor) -> None:
        """Takes the loss of a step on this rank.

        It is looked at when the next step's loss is there to be computed: a GPU would have to be waited for at once.
        """
        self.check_loss()
        loss = loss.clone()
        if self.num_ranks > 1:  # so that all of them end together where one has a loss that is not finite
            torch.distributed.all_reduce(loss)
        loss = loss / self.num_ranks
        self.last = step, rows, Fetch(loss)
        self.loss_sum, self.num_summed = self.loss_sum + loss, self.num_summed + 1

    def check_loss(self) -> None:
        """Checks the loss of the last step.

        Raises:
            TrainingError: It is not finite.
        """
        if self.last and not torch.isfinite(self.last[2].get()):
            step, rows, loss = self.last
            raise TrainingError(
                f"finetune: the loss of step {step} is not finite ({loss.get().item()}). Its pairs (query/document):"
                f" {self._name_pairs(rows)}. Pass a lower --learning-rate, or look at these texts."
            )

    def note_loss(self, step: int, entry: Mapping[str, float]) -> None:
        """Adds the mean loss since the last such entry, and more, to the log."""
        self.note({"step": step, "loss": float(self.loss_sum) / self.num_summed, **entry})
        self.loss_sum, self.num_summed = 0.0, 0

    def note(self, entry: dict[str, float]) -> None:
        """Adds an entry to the log."""
        self.entries.append(entry)
        if self.is_first:
            self.observer.log(entry)

    def judge(self, step: int, figures: Mapping[str, float]) -> bool:
        """Notes the dev split's figures and keeps the weights if they are the best so far; returns whether to go on."""
        self.note({"step": step, **figures})
        if figures[DEV] > self.best_score:
            self.best_step, self.best_score, self.num_worse = step, figures[DEV], 0
            if self.is_first:
                self.observer.before_writing()
                checkpoints.write_best(self.job.checkpoints, self.network, step, self._notes())
        else:
            self.num_worse += 1
        if self.job.recipe.patience and self.num_worse >= self.job.recipe.patience:
            self.stopped_at = step
        return self.stopped_at is None

    def keep_best(self) -> None:
        """Loads the weights of the best evaluation, where there was any.

        Raises:
            RuntimeError: They are not there as they were written.
        """
        if self.num_ranks > 1:
            torch.distributed.barrier()
        if self.best_step is None:
            return
        best = checkpoints.best(self.job.checkpoints, self.best_step, self.job.identity)
        if best is None:
            raise RuntimeError(f"{self.job.checkpoints}: the best checkpoint is damaged. Pass --replace to train anew.")
        best.load(self.network)

    def summary(self) -> dict[str, Any]:
        """Returns what there is to say about the run, as JSON."""
        kept = self.job.recipe.num_steps if self.best_step is None else self.best_step
        found = {"kept_step": kept, "stopped_at": self.stopped_at, "notices": self.notices, **self.facts}
        return {"summary": found, "recipe": dataclasses.asdict(self.job.recipe), "entries": self.entries}

    def _name_pairs(self, rows: Sequence[int]) -> str:
        names = examples.name_pairs(self.job.pair_files, [int(row) for row in rows[:_SHOWN_PAIRS]])
        return f"{', '.join(names)}{f' and {len(rows) - len(names)} more' if len(rows) > len(names) else ''}"


class _Watch(TrainerCallback):
    """What happens between two steps: the log, dev evaluations, checkpoints, the wish to stop."""

    def __init__(
        self, run: _Run, optimiser: torch.optim.Optimizer, first_step: int, extras: Mapping[Role, Mapping[str, int]]
    ) -> None:
        self._extras = extras
        self._run, self._optimiser, self._first = run, optimiser, first_step
        job = run.job
        self._steps = job.recipe.evaluation_steps if job.dev else frozenset()
        self._step = first_step
        self._evaluator: DevEvaluator | None = None
        if job.dev:
            tokeniser = make_tokeniser(run.network, None)
            self._evaluator = DevEvaluator(job.dev, tokeniser, self._embed, job.recipe.dims)

    def _embed(self, tokens: Tokens, role: Role) -> Tensor:
        with torch.no_grad(), self._run.job.autocast():
            return _embed(self._run.network, tokens.ids, tokens.lengths, self._extras[role])

    def _evaluate(self, step: int) -> bool:
        """Measures the model after ``step`` steps, if that is due; returns whether to go on."""
        if step not in self._steps or self._evaluator is None:
            return True
        self._run.check_loss()
        self._run.network.eval()
        figures = self._evaluator.measure()
        self._run.network.train()
        return self._run.judge(step, figures)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._first == 0:
            self._evaluate(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Writes what is due after the steps so far, the log included, and fixes the randomness of the next step."""
        run, step = self._run, self._first + state.global_step
        self._step = step
        is_wanted = run.observer.wants_checkpoint(step)
        if step > self._first and (is_wanted or step % run.job.recipe.checkpoint_steps == 0):
            run.write_checkpoint(self._optimiser, step)
        elif is_wanted and run.is_first:
            run.observer.checkpointed(step)  # nothing has been done since
        seed = hashlib.sha256(f"{run.job.recipe.seed} {step} {run.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "big"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._step, num_steps = self._first + state.global_step, self._run.job.recipe.num_steps
        if not self._evaluate(self._step):
            control.should_training_stop = True
        # Counted from the run's beginning, wherever this process has begun.
        control.should_log = self._step % self._run.job.recipe.log_steps == 0 or self._step == num_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            entry = {key: float(logs[key]) for key in ("learning_rate", "grad_norm") if key in logs}
            self._run.note_loss(self._step, entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._run.stopped_at is not None:
            self._run.write_checkpoint(self._optimiser, self._step)

    def take_loss(self, rows: Sequence[int], loss: Tensor) -> None:
        """Takes the loss of the step that is being taken, and the rows of its pairs."""
        self._run.take_loss(self._step + 1, rows, loss)


def _arguments(job: Job, num_steps: int, num_ranks: int) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there
        max_steps=num_steps,
        per_device_train_batch_size=job.recipe.batch_size // num_ranks,
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_nan_inf_filter=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
