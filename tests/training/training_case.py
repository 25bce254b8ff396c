"""A small run for the tests of the trainer: real model, real adapter, rows in memory; everything else by keyword."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.core.adapters.lora import adapter_state, attach_adapter, load_adapter_state, save_adapter
from qlora_cli.core.data.dataset import split_rows
from qlora_cli.core.data.sampler import BatchSampler
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.runs.metrics import as_metrics
from qlora_cli.core.storage.checkpoint import newest_valid, read_tensors
from qlora_cli.core.training.accumulation import ModelReplica
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.lr_schedule import learning_rate_schedule
from qlora_cli.core.training.optimizer import build_optimizer
from qlora_cli.core.training.progress import TrainerState, read_trainer_state
from qlora_cli.core.training.reporting import RunReporter
from qlora_cli.core.training.rng_state import RandomState, restore_random_state
from qlora_cli.core.training.state import REQUIRED_FILES, Checkpointing, load_optimizer, read_random_state
from qlora_cli.core.training.trainer import Optimization, Trainer, TrainingData
from qlora_cli.events import EvaluationLogged, Event, StepLogged
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

CPU = torch.device("cpu")


class MemoryRows:
    """Random rows of 5 to 40 tokens; the first three of each are not trained."""

    def __init__(self, count: int = 24) -> None:
        random = np.random.default_rng(0)
        self.lengths = random.integers(5, 40, count).astype(np.int32)
        self.records = np.arange(count)
        self.ids = [random.integers(2, 380, length).astype(np.int32) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[index], np.arange(len(self.ids[index])) >= 3


@dataclass
class Case:
    """A run that can be started, continued in a new object, and looked into."""

    trainer: Trainer
    model: Any
    random_state: RandomState | None
    events: list[Event] = field(default_factory=list)

    def run(self) -> "Case":
        """Trains from its own random state, whatever ran before."""
        if self.random_state is None:
            torch.manual_seed(self.trainer.ranks.rank)
        else:
            restore_random_state(self.random_state, CPU)
        self.trainer.run()
        return self

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """A copy of the trained tensors."""
        return {name: tensor.detach().clone() for name, tensor in adapter_state(self.model).items()}

    def lines(self) -> list[str]:
        """The metrics reported so far, without what the clock says."""
        lines = []
        for event in self.events:
            if isinstance(event, StepLogged | EvaluationLogged):
                clock = ("step_seconds", "tokens_per_second")
                lines.append(
                    json.dumps({name: value for name, value in as_metrics(event).items() if name not in clock})
                )
        return lines

    def reported(self, kind: type) -> list[Any]:
        """Events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


def make_case(
    base: Path,
    root: Path,
    *,
    optimizer: str = "adamw",
    dropout: float = 0.1,
    epochs: float = 2.0,
    max_steps: int | None = None,
    eval_rows: int = 0,
    save_every: int = 4,
    keep: int = 2,
    keep_best: bool = False,
    patience: int | None = None,
    eval_every: int | None = None,
    scaled: bool = False,
    learning_rate: float = 5e-3,
    max_grad_norm: float = 1.0,
    batch_size: int = 2,
    b_rate: float = 1.0,
    noise_alpha: float = 0.0,
    resume: bool = False,
    ranks: ProcessGroup | None = None,
    wrap_engine: Any = lambda engine: engine,
    compute_dtype: torch.dtype = torch.float32,
    deferred: bool = False,
    target_modules: tuple[str, ...] | None = ("q_proj", "down_proj"),
    on_step: Callable[[StepLogged], Any] = lambda event: None,
) -> Case:
    """Builds a run on a tiny base, or with `resume` the continuation of the one saved in `root`.

    `on_step` is called with each step, before it counts as reported.
    """
    ranks = ranks or ProcessGroup()
    rows = MemoryRows()
    train, held = split_rows(rows, fraction=0, count=eval_rows, seed=1)
    common: dict[str, Any] = {"batch_size": batch_size, "packing": False, "max_length": 40, "seed": 1, "ranks": ranks}
    sampler = BatchSampler(train.lengths, accumulation=2, epochs=epochs, max_steps=max_steps, **common)
    eval_sampler = BatchSampler(held.lengths, accumulation=1, epochs=1, max_steps=None, **common) if eval_rows else None
    frozen, _ = load_base(
        resolve_model(str(base)), QuantizationSettings(base_cache=False), compute_dtype=compute_dtype, device=CPU
    )
    lora = LoraSettings(rank=4, alpha=8, dropout=dropout, target_modules=target_modules)
    model = attach_adapter(frozen, lora, seed=0)
    engine = install_engine(
        model,
        StepSettings(engine="plain", neftune_noise_alpha=noise_alpha),
        device=CPU,
        compute_dtype=compute_dtype,
        max_tokens=80,
        total_steps=sampler.total_steps,
        report=lambda event: None,
    )
    parameters = TrainableParameters(model, b_rate)
    built = build_optimizer(optimizer, parameters, weight_decay=0.01)
    trainer_state = TrainerState()
    random_state = None
    if resume:
        checkpoint, _ = newest_valid(root, REQUIRED_FILES)
        assert checkpoint is not None
        trainer_state = read_trainer_state(checkpoint.path)
        load_adapter_state(model, read_tensors(checkpoint.path / ADAPTER_WEIGHTS))
        load_optimizer(checkpoint.path, built, parameters)
        random_state = read_random_state(checkpoint.path, ranks.rank)
    events: list[Event] = []

    def report(event: Event) -> None:
        if isinstance(event, StepLogged):
            on_step(event)
        events.append(event)

    trainer = Trainer(
        replica=ModelReplica(model, wrap_engine(engine), ranks),
        data=TrainingData(train, sampler, held, eval_sampler),
        optimization=Optimization(
            parameters,
            built,
            unallocated_bytes=0,
            learning_rate=learning_rate_schedule(
                "cosine", peak=learning_rate, warmup_steps=2, total_steps=sampler.total_steps
            ),
            max_grad_norm=max_grad_norm,
            scaled=scaled,
        ),
        eval_every=eval_every,
        patience=patience,
        checkpointing=Checkpointing(
            root,
            {"case": 1},
            lambda path: save_adapter(model, path, base_name="base"),
            needed_bytes=10_000,
            every=save_every,
            keep=keep,
            keep_best=keep_best,
        ),
        reporter=RunReporter(report, deferred=deferred),
        state=trainer_state,
    )
    return Case(trainer, model, random_state, events)


class FaultyEngine:
    """The engine underneath, until `fault` says otherwise.

    Args:
        engine: Computes the losses.
        fault: Called with the number of the call (from 1), the batch and the loss; raises, or returns a loss.
    """

    def __init__(self, engine: Any, fault: Any) -> None:
        self.engine = engine
        self.compiled = engine.compiled
        self.fault = fault
        self.calls = 0

    def loss(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        return self.fault(self.calls, batch, self.engine.loss(batch))

    def prepare(self, batch):
        return self.engine.prepare(batch)

    def reduce_memory(self) -> bool:
        return self.engine.reduce_memory()

    def describe(self) -> str:
        return "faulty"

    def close(self) -> None:
        self.engine.close()
