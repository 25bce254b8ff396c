"""Survey of architectures: each built small, trained, answered, merged, read by PEFT, and compared with transformers.

    python benchmarks/survey.py --json survey.json --table benchmarks/models.md
    python benchmarks/survey.py --only llama --only mixtral

On the CPU, in float32. What is compared with is transformers' own model, every packed weight replaced by its
dequantised value. A cell is right within the limits below, or names what is wrong; an architecture may be refused in
one sentence. Anything else ends the survey with an error.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from support.architectures import ARCHITECTURES, write_model

from qlora_cli.errors import QloraError

TEXTS = (
    "The adapter is added to the weights that it was trained on.",
    "Rows of a pack never see one another, whatever the layer.",
    "Seven small models learn from a few short lines of text.",
    "What is not in four bits is said, with the reason for it.",
)
PROMPT = "The adapter is"
NEW_TOKENS = 12
TRAINED = {"max_length": 64, "max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 2e-2}
TRAINED |= {"rank": 8, "alpha": 16, "warmup_steps": 0, "scheduler": "constant", "packing": True}
# Relative errors in float32: of gradients, of logits against what the adapter changes, and of weights rounded to float32.
MOST_GRADIENT, MOST_LOGITS = 2e-5, 2e-4
COLUMNS = {
    "trains": "trains",
    "share": "in 4 bits",
    "rows": "rows, gradient against single ones",
    "answers": "greedy = transformers'",
    "merged": "merged against base + adapter",
    "copy": "base copy",
    "peft": "PEFT loads it",
}


def survey(name: str, directory: Path, *, brief: bool = False) -> dict[str, str]:
    """The cells of one architecture, or under "refused" why it is not trained; what is wrong begins with "WRONG".

    A brief one leaves out answers and the base's copy, which take half of the time.
    """
    import torch

    from qlora_cli.commands.train import train
    from qlora_cli.config import TrainConfig
    from qlora_cli.events import report_nothing

    base, run = directory / "base", directory / "run"
    write_model(base, name)
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    try:
        config = TrainConfig(model=str(base), data=str(rows), output=str(run), base_cache=False, **TRAINED)
        result = train(config, report_nothing)
    except QloraError as error:
        return {"refused": error.message}
    found = {"trains": f"yes, loss {result.final_loss:.2f}", "share": describe_share(base)}
    packed = load_4bit(base)
    adapted, found["peft"] = load_reference(base, run, packed)
    found["rows"] = compare_rows(base, run, packed)
    ids = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    wanted = logits_of(adapted, ids)
    with adapted.disable_adapter():
        effect = (wanted - logits_of(adapted, ids)).abs().max()
    if not brief:
        found["answers"] = compare_answers(run, adapted)
        found["copy"] = compare_copy(base, directory / "cache")
    found["merged"] = compare_merged(run, directory / "merged", ids, wanted, effect)
    return found


def describe_share(base: Path) -> str:
    """Share of the body in 4 bits; below 95 %, what most of the rest is."""
    from qlora_cli.core.models.account import BODY_SHARE, plan_packing
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.structure import build_empty

    plan = plan_packing(build_empty(resolve_model(str(base)).config))
    rest = next(iter(plan.rest()), "")
    return f"{plan.share:.0%}" + (f" ({rest})" if plan.share < BODY_SHARE else "")


def load_4bit(base: Path, *, cached: bool = False):
    """The 4-bit base in float32 on the CPU."""
    import torch

    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.loading import load_base
    from qlora_cli.settings.groups import QuantizationSettings

    held = QuantizationSettings(base_cache=cached)
    return load_base(resolve_model(str(base)), held, compute_dtype=torch.float32, device=torch.device("cpu"))[0]


def compare_rows(base: Path, run: Path, packed) -> str:
    """The fast engine's gradient of all rows at once against the plain engine's of each row alone, on one 4-bit base."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from qlora_cli.core.adapters.lora import load_adapter
    from qlora_cli.core.data.packing import collate
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.events import report_nothing
    from qlora_cli.settings.groups import StepSettings

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in TEXTS]
    rows = [(row, np.ones(len(row), dtype=bool)) for row in rows]

    model = load_adapter(packed, run).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradient(kind, batches):
        model.zero_grad()
        engine = install_engine(
            model,
            StepSettings(engine=kind),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            max_tokens=512,
            total_steps=1,
            report=report_nothing,
        )
        for batch in batches:
            engine.loss(batch).backward()
        engine.close()
        packed = "packed" if "packed rows" in engine.describe() else "padded"
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
        return torch.cat(grads), packed

    alone, _ = gradient("plain", [collate([row], [0]) for row in rows])
    together, kind = gradient("fast", [collate(rows, list(range(len(rows))))])
    error = float((alone - together).norm() / alone.norm())
    return judge(f"{kind}, {error:.0e}", error <= MOST_GRADIENT)


def load_reference(base: Path, run: Path, packed):
    """transformers' own model, its weights those of the packed one, with the adapter by PEFT; and whether PEFT took all
    of it."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open

    from qlora_cli.core.experts.four_bit_experts import FourBitExperts
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears
    from qlora_cli.core.models.structure import model_class

    reference = model_class(resolve_model(str(base)).config).from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in four_bit_linears(packed):
            weight, values = reference.get_submodule(name).weight, dequantized_weight(module)
            is_transposed = type(reference.get_submodule(name)).__name__ == "Conv1D"
            weight.copy_(values.T if is_transposed else values)
        for name, module in packed.named_modules():
            for stack in module.expert_weights if isinstance(module, FourBitExperts) else ():
                whole = getattr(reference.get_submodule(name), stack.name)
                for expert in range(stack.experts):
                    whole[expert].copy_(stack.as_matrix(module.dequantized(stack.name, expert)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(reference, str(run)).eval()
    lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    with safe_open(run / "adapter_model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    loaded = [p for n, p in adapted.named_parameters() if "lora_" in n]
    whole = sum(p.numel() for p in loaded) == sum(t.numel() for t in stored.values())
    exact = {float(p.double().sum()) for p in loaded} == {float(t.double().sum()) for t in stored.values()}
    return adapted, judge("yes", not lost and whole and exact)


def logits_of(model, ids):
    """(rows, tokens, vocabulary) float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def compare_answers(run: Path, adapted) -> str:
    """`qlora generate` at temperature 0 against greedy steps of the reference without a cache."""
    import torch
    from transformers import AutoTokenizer

    from qlora_cli.commands.generate import generate
    from qlora_cli.config import GenerateConfig
    from qlora_cli.events import report_nothing

    config = GenerateConfig(adapter=str(run), temperature=0.0, max_new_tokens=NEW_TOKENS, raw=True, base_cache=False)
    result = generate(config, [PROMPT], report_nothing)
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(NEW_TOKENS):
        chosen = logits_of(adapted, ids)[:, -1].argmax(-1, keepdim=True)
        if int(chosen) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, chosen], 1)
    wanted = tokenizer.decode(ids[0], skip_special_tokens=True)[len(PROMPT) :]
    answer = result.answers[0]["answer"]
    kind = "transformers' generate" if "transformers" in (result.path or "") else "own steps"
    # An unfinished character at the end is held back here, and printed as U+FFFD by transformers.
    return judge(f"yes, {kind}", wanted.rstrip("�").strip() == answer.rstrip("�").strip())


def compare_merged(run: Path, merged: Path, ids, wanted, effect) -> str:
    """Logits of the merged checkpoint, whole and in its own class, against base + adapter, by what the adapter does."""
    import torch

    from qlora_cli.commands.merge import merge
    from qlora_cli.config import MergeConfig
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.structure import model_class
    from qlora_cli.events import report_nothing

    try:
        config = MergeConfig(adapter=str(run), output=str(merged), base="dequantized", dtype="float32", verify=False)
        merge(config, report_nothing)
    except QloraError as error:
        return f"refused: {error.message}"
    model, info = model_class(resolve_model(str(merged)).config).from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    error = float((logits_of(model.eval(), ids) - wanted).abs().max() / effect)
    whole = not info["missing_keys"] and not info["mismatched_keys"]
    return judge(f"{error:.0e}", error <= MOST_LOGITS and whole)


def compare_copy(base: Path, cache: Path) -> str:
    """The base from the cache against the one that was put there, bit for bit."""
    import torch

    before = os.environ.get("QLORA_CACHE")
    os.environ["QLORA_CACHE"] = str(cache)
    try:
        made, kept = load_4bit(base, cached=True).state_dict(), load_4bit(base, cached=True).state_dict()
    finally:
        os.environ.pop("QLORA_CACHE")
        if before is not None:
            os.environ["QLORA_CACHE"] = before
    copies = list(cache.rglob("base.safetensors"))
    same = set(made) == set(kept) and all(torch.equal(made[name], kept[name]) for name in made)
    return judge("bit-equal", same and len(copies) == 1)


def judge(cell: str, right: bool) -> str:
    """A cell, marked where it is wrong."""
    return cell if right else f"WRONG: {cell}"


def survey_in(name: str, root: Path) -> dict[str, str]:
    """`survey` in a folder that is removed; whatever it raises is a wrong line."""
    directory = root / name
    shutil.rmtree(directory, ignore_errors=True)
    try:
        return survey(name, directory)
    except Exception as error:  # a survey goes on
        return {"refused": f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_table(found: dict[str, dict[str, str]], path: Path) -> None:
    """The page, its introduction kept."""
    head = "| architecture | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1) + "\n"
    lines = []
    for name, cells in found.items():
        refused = cells.get("refused")
        rest = [
            f"refused: {refused}" if refused else cells["trains"],
            *(cells.get(key, "–") for key in list(COLUMNS)[1:]),
        ]
        lines.append(f"| {name} | " + " | ".join(cell.replace("|", "/") for cell in rest) + " |\n")
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Models\n\n<!-- table -->\n"
    start = text.index("<!-- table -->") + len("<!-- table -->\n")
    path.write_text(text[:start] + "\n" + head + "".join(lines), encoding="utf-8")


def main() -> None:
    """Runs the survey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(ARCHITECTURES), help="this architecture; repeatable")
    parser.add_argument("--json", type=Path, help="write the cells there")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.only or ARCHITECTURES:
            found[name] = survey_in(name, Path(root))
            print(name, found[name], flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.table:
        write_table(found, arguments.table)
    wrong = [name for name, cells in found.items() if any("WRONG" in cell for cell in cells.values())]
    print(
        f"{len(found)} architectures, {sum('refused' in c for c in found.values())} refused, wrong: {wrong or 'none'}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
