"""Cases of a merge: an adapter on the disk, as a run leaves it, and what base + adapter predict."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_cli.artifacts import FORMAT, RUN_RECORD
from qlora_cli.commands.merge import MergeResult, merge
from qlora_cli.config import MergeConfig
from qlora_cli.core.adapters.targets import find_targets
from qlora_cli.core.device import choose_device, dtype_name
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import freeze_base
from qlora_cli.events import Event, Report
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings

DEVICE = choose_device()  # where the command works too: CPU and GPU may round a weight near a border differently
IDS = torch.arange(2, 66).unsqueeze(0)  # every prediction depends on all of these


@dataclass
class Case:
    """An adapter in `adapter`, made on `base`, and the logits of the two together."""

    base: Path
    adapter: Path
    output: Path
    live: torch.Tensor  # (tokens, vocabulary) float32

    def merge(self, events: list[Event] | None = None, report: Report | None = None, **settings: Any) -> MergeResult:
        """Runs the command; without verification unless asked."""
        config = MergeConfig(adapter=str(self.adapter), output=str(self.output), **{"verify": False, **settings})
        return merge(config, report or (events if events is not None else []).append)

    def merged_logits(self, **loading: Any) -> torch.Tensor:
        """Of the merged checkpoint, as transformers loads it by itself."""
        model, found = AutoModelForCausalLM.from_pretrained(
            self.output, output_loading_info=True, device_map={"": DEVICE}, **loading
        )
        assert not found["missing_keys"] and not found["mismatched_keys"], found
        return logits_of(freeze_base(model) if hasattr(model.config, "quantization_config") else model.eval())

    def change_config(self, **changes: Any) -> None:
        """Edits adapter_config.json."""
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """(tokens, vocabulary) float32."""
    with torch.inference_mode():
        return model(input_ids=IDS.to(DEVICE)).logits[0].float().cpu()


def make_case(
    base: Path,
    directory: Path,
    *,
    compute_dtype: torch.dtype = torch.float32,
    quant_type: str = "nf4",
    double_quant: bool = True,
    recorded: bool = True,
    new_tokens: int = 0,
    change: Callable[[PeftModel], None] | None = None,
    **lora: Any,
) -> Case:
    """Attaches an adapter to the 4-bit base, moves all it trains away from the start, saves it with PEFT's own code.

    Args:
        base: Checkpoint.
        directory: Where the adapter and the merged model go.
        compute_dtype: Of the run.
        quant_type: Of the run.
        double_quant: Of the run.
        recorded: Whether the run's record is written.
        new_tokens: Rows the vocabulary grows by.
        change: Applied to the model with the adapter before it is saved.
        lora: Arguments of LoraConfig.
    """
    model, identity = load_base(
        resolve_model(str(base)),
        QuantizationSettings(base_cache=False, quant_type=quant_type, double_quant=double_quant),
        compute_dtype=compute_dtype,
        device=DEVICE,
    )
    if new_tokens:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + new_tokens, mean_resizing=False)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": find_targets(model, LoraSettings()),
        **lora,
    }
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if change:
        change(peft_model)
    adapter = directory / "adapter"
    peft_model.save_pretrained(adapter, save_embedding_layers=bool(new_tokens) or "auto")
    if recorded:
        record = {"format": FORMAT, "base": asdict(identity)}
        (adapter / RUN_RECORD).write_text(json.dumps(record))
    assert identity.compute_dtype == dtype_name(compute_dtype)
    return Case(base, adapter, directory / "merged", logits_of(peft_model.eval()))
