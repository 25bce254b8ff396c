"""The same faults for transformers' own Trainer: a LoRA run of six steps, saved every two, as its documentation has it."""

import contextlib
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .victims import CALLS, FileCalls


class Faults(TrainerCallback):
    """Begins a fault when training begins, or after a step."""

    def __init__(self, begin: Any, step: int = 0) -> None:
        self.begin = begin
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if not self.step:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            self.begin()


class FaultyTrainer(Trainer):
    """Loss that is NaN in some steps; memory that runs out in one, while the batch is too large."""

    nan_steps: tuple[int, ...] = ()
    out_of_memory_above: int = 10**9
    seen: tuple[int, ...] = ()

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        rows, step = len(inputs["input_ids"]), self.state.global_step + 1
        self.seen = (*self.seen, step)
        if step >= 3 and rows > self.out_of_memory_above:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        return loss * torch.nan if step in self.nan_steps else loss


def train(model: str, output: str, resume: bool = False, fault: dict[str, Any] | None = None) -> None:
    """A run of the stock Trainer; its adapter goes to `output`/final, what it logged to `output`/log.json."""
    fault = fault or {}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    rows = np.random.default_rng(0).integers(2, 380, (30, 12))
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        save_steps=2,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        auto_find_batch_size="out_of_memory_above" in fault,
    )
    trainer = FaultyTrainer(
        model=peft.get_peft_model(base, config),
        args=arguments,
        train_dataset=[{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows],
    )
    trainer.nan_steps = tuple(fault.get("nan_steps", ()))
    trainer.out_of_memory_above = fault.get("out_of_memory_above", 10**9)
    with contextlib.ExitStack() as stack:
        calls = FileCalls(fault.get("kill_at"))
        if "kill_at" in fault or "names_to" in fault:
            watch(calls, stack)
            trainer.add_callback(Faults(lambda: setattr(calls, "counting", True)))
        if "limit_bytes" in fault:
            limits = (fault["limit_bytes"], resource.RLIM_INFINITY)
            trainer.add_callback(Faults(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), step=3))
        if "killed_after" in fault:
            trainer.add_callback(Faults(lambda: os.kill(os.getpid(), signal.SIGKILL), step=fault["killed_after"]))
        trainer.train(resume_from_checkpoint=resume or None)
    if "names_to" in fault:
        Path(fault["names_to"]).write_text("\n".join(calls.names))
    trainer.save_model(f"{output}/final")
    history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    Path(output, "log.json").write_text(json.dumps({"losses": history, "steps_run": trainer.seen}))


def watch(calls: FileCalls, stack: contextlib.ExitStack) -> None:
    """Counts the Trainer's file calls; torch.save and safetensors die with the file half written."""
    for name in CALLS:
        stack.enter_context(mock.patch.object(os, name, calls.wrap(name, getattr(os, name))))
    save = torch.save

    def half_save(content: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        dying = calls.begin(f"write {Path(path).name}")
        save(content, path, *arguments, **keywords)
        if dying:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    save_json = TrainerState.save_to_json

    def half_save_json(state: TrainerState, path: str) -> None:
        dying = calls.begin(f"write {Path(path).name}")
        save_json(state, path)
        if dying:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    stack.enter_context(mock.patch.object(torch, "save", half_save))
    stack.enter_context(mock.patch.object(TrainerState, "save_to_json", half_save_json))
    stack.enter_context(mock.patch.object(peft.peft_model, "safe_save_file", calls.save_file))
