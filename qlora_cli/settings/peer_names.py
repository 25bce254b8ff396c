"""What other fine-tuning tools call a setting, a value or a command, and what it is called here: for hints, never taken as such.

From the command lines of trl, axolotl, LLaMA-Factory, Unsloth, torchtune, mlx-lm, litgpt, llama.cpp and transformers.
"""

import difflib
from collections.abc import Iterable

# Setting here → names elsewhere, with dashes.
_SETTINGS = {
    "model": "base-model model-name model-name-or-path model-id model-path pretrained base checkpoint hf-path repo-id",
    "data": "dataset datasets dataset-name dataset-path data-path train-file train-data train-dataset training-data",
    "output": "output-dir out out-dir save-dir save-path outdir run-dir dest",
    "adapter": "adapter-path adapter-name-or-path lora lora-path peft peft-model lora-model-dir ckpt adapter-dir run",
    "rank": "r lora-r lora-rank lora-dim",
    "alpha": "lora-alpha",
    "dropout": "lora-dropout",
    "target_modules": "lora-target lora-target-modules target lora-modules modules keys layers-to-transform",
    "prompt_column": "question-column instruction-column input-column query-column",
    "completion_column": "answer-column response-column output-column target-column",
    "rslora": "use-rslora",
    "dora": "use-dora",
    "init": "init-lora-weights lora-init",
    "learning_rate": "lr max-lr peak-lr",
    "loraplus_lr_ratio": "lora-plus-ratio loraplus-ratio lora-plus lorap-lr-ratio",
    "neftune_noise_alpha": "neftune noise-alpha neftune-alpha",
    "batch_size": "bs batch per-device-train-batch-size micro-batch-size train-batch-size per-device-batch-size "
    "device-batch-size",
    "gradient_accumulation_steps": "grad-accum gradient-accumulation accumulation-steps grad-acc-steps ga grad-accumulation-steps",
    "epochs": "epoch num-epochs num-train-epochs n-epochs",
    "max_steps": "steps iters max-iters num-steps train-steps",
    "max_length": "max-seq-length max-seq-len seq-len seq-length cutoff-len sequence-len model-max-length block-size "
    "context-length ctx-size max-tokens",
    "scheduler": "lr-scheduler lr-scheduler-type schedule lr-schedule min-lr lr-min min-lr-rate",
    "warmup_steps": "warmup num-warmup-steps",
    "optimizer": "optim",
    "max_grad_norm": "grad-clip clip clip-grad gradient-clipping",
    "weight_decay": "wd",
    "eval_fraction": "val-size val-split validation-split test-size val-set-size eval-split test-split",
    "eval_every": "eval-steps steps-per-eval evaluation-steps eval-strategy evaluation-strategy",
    "keep_best": "load-best-model-at-end load-best save-best",
    "patience": "early-stopping-patience early-stopping early-stop",
    "save_every": "save-steps checkpoint-every",
    "keep": "save-total-limit",
    "resume": "resume-from-checkpoint continue resume-adapter-file auto-resume",
    "packing": "sample-packing pack",
    "gpus": "num-gpus n-gpus devices nproc-per-node num-processes world-size",
    "shard": "fsdp deepspeed zero",
    "context_parallel": "context-parallel-size context-parallel-degree cp-size sequence-parallel-size "
    "sequence-parallel-degree sequence-parallel ulysses",
    "vram": "max-memory gpu-memory memory max-vram",
    "report_to": "wandb logger tracker log-to logging",
    "compute_dtype": "bf16 fp16 dtype torch-dtype bnb-4bit-compute-dtype precision mixed-precision",
    "quant_type": "bnb-4bit-quant-type quantization quant",
    "double_quant": "use-double-quant bnb-4bit-use-double-quant use-nested-quant",
    "gradient_checkpointing": "grad-checkpoint grad-checkpointing activation-checkpointing",
    "chat_template": "chat-template-path",
    "template": "prompt-template",
    "train_on": "train-on-inputs mask-prompt assistant-only-loss completion-only-loss train-on-prompt",
    "workers": "num-proc num-workers preprocessing-num-workers dataset-num-proc",
    "limit": "max-samples max-train-samples num-samples",
    "max_new_tokens": "max-tokens n-predict max-length num-predict max-gen-tokens",
    "temperature": "temp t",
    "repetition_penalty": "repeat-penalty",
    "input": "prompts-file input-file prompt-file",
    "push": "push-to-hub hub-model-id upload repo upload-repo",
    "format": "gguf outtype export-format to",
    "gguf_type": "outtype quantization-method q",
    "overwrite": "force overwrite-output-dir f",
    "dry_run": "dryrun check simulate",
    "as_json": "output-format",
    "config_file": "cfg conf settings yaml config-file recipe",
    "quiet": "silent",
    "debug": "traceback trace",
    "base_cache": "base-cache no-base-cache",
}
PEERS: dict[str, list[str]] = {}
for _setting, _names in _SETTINGS.items():
    for _name in _names.split():
        PEERS.setdefault(_name, []).append(_setting)

# What has no setting here, and why.
UNNEEDED = {
    "adapter": "A run makes an adapter of its own, and --resume goes on with it; to train on top of another, merge that one "
    "first and give what comes of it as --model.",
    "load-in-4bit": "The base is always held in 4 bits: leave it out.",
    "bits": "The base is always held in 4 bits: leave it out.",
    "quantization-bit": "The base is always held in 4 bits: leave it out.",
    "load-in-8bit": "The base is held in 4 bits, and there is no other way here: leave it out.",
    "flash-attn": "Fast attention is on by itself where it can be: leave it out.",
    "flash-attention": "Fast attention is on by itself where it can be: leave it out.",
    "use-flash-attention-2": "Fast attention is on by itself where it can be: leave it out.",
    "attn-implementation": "Fast attention is on by itself where it can be; --engine plain turns it off.",
    "device": "The GPU is taken where there is one; CUDA_VISIBLE_DEVICES= before the command hides it.",
    "device-map": "Where weights go is decided by itself; --vram sets a limit, --shard spreads them over cards.",
    "use-lora": "Training is always with LoRA adapters: leave it out.",
    "finetuning-type": "Training is always with LoRA adapters: leave it out.",
    "group-by-length": "Rows of like length are grouped by themselves: leave it out.",
    "shuffle": "Rows come in an order that --seed decides, another in each epoch: leave it out.",
    "logging-steps": "Every step is logged: leave it out.",
    "per-device-eval-batch-size": "Rows held out are measured in micro-batches of --batch-size: leave it out.",
    "eval-batch-size": "Rows held out are measured in micro-batches of --batch-size: leave it out.",
    "prompt": 'The prompt is an argument of its own: qlora generate --adapter out "Your question"',
    "hub-token": "Run: hf auth login",
    "token": "Run: hf auth login",
    "task": "Training is always of a causal language model: leave it out.",
}
VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adam": "adamw",
    "8bit-adam": "adamw_8bit",
    "int4": "nf4",
    "int8": "nf4",
    "4bit": "nf4",
    "alpaca": "prompt",
    "instruct": "prompt",
    "instruction": "prompt",
    "sharegpt": "chat",
    "messages": "chat",
    "openai": "chat",
    "conversation": "chat",
    "completion": "text",
    "raw": "text",
    "tb": "tensorboard",
    "weights-and-biases": "wandb",
    "constant_with_warm_up": "constant_with_warmup",
    "safetensors": "transformers",
    "hf": "transformers",
    "q8": "q8_0",
    "q4_k_m": "f16",
}
COMMANDS = {
    "finetune": "qlora train",
    "fine-tune": "qlora train",
    "ft": "qlora train",
    "sft": "qlora train",
    "fit": "qlora train",
    "lora": "qlora train",
    "resume": "qlora train --config out/run.yaml --resume",
    "tokenize": "qlora prepare",
    "preprocess": "qlora prepare",
    "dataset": "qlora prepare",
    "infer": 'qlora generate --adapter out "Your question"',
    "inference": 'qlora generate --adapter out "Your question"',
    "predict": 'qlora generate --adapter out "Your question"',
    "ask": 'qlora generate --adapter out "Your question"',
    "run": 'qlora generate --adapter out "Your question"',
    "complete": 'qlora generate --adapter out "Your question"',
    "talk": "qlora chat --adapter out",
    "export": "qlora merge --adapter out --output merged --format gguf",
    "convert": "qlora merge --adapter out --output merged --format gguf",
    "gguf": "qlora merge --adapter out --output merged --format gguf",
    "ollama": "qlora merge --adapter out --output merged --format gguf",
    "fuse": "qlora merge --adapter out --output merged",
    "save": "qlora merge --adapter out --output merged",
    "quantize": "qlora merge --adapter out --output merged --quantize",
    "push": "qlora merge --adapter out --output merged --push ORG/NAME",
    "upload": "qlora merge --adapter out --output merged --push ORG/NAME",
    "publish": "qlora merge --adapter out --output merged --push ORG/NAME",
    "serve": "qlora merge --adapter out --output merged, then: vllm serve merged",
    "eval": "qlora train --eval-fraction 0.1, or lm-eval on a merged model",
    "evaluate": "qlora train --eval-fraction 0.1, or lm-eval on a merged model",
    "info": "qlora inspect",
    "show": "qlora inspect --adapter out",
    "doctor": "qlora inspect",
    "env": "qlora inspect",
    "status": "qlora inspect --adapter out",
    "estimate": "qlora inspect --model ID --vram 12GiB",
    "memory": "qlora inspect --model ID --vram 12GiB",
    "help": "qlora --help",
    "version": "qlora --version",
    "login": "hf auth login",
    "recipes": "qlora train --list-recipes",
    "config": "qlora train --list-recipes",
    "init": "qlora train --list-recipes",
}


def suggest_setting(name: str, known: Iterable[str]) -> str | None:
    """The setting that a name of another tool means, else the one spelt most like it; None where nothing is near.

    Args:
        name: With dashes or underscores.
        known: Settings that there are, with underscores.
    """
    known = list(known)
    dashed = name.strip("-").replace("_", "-").lower()
    for setting in PEERS.get(dashed, ()):
        if setting in known:
            return setting
    close = difflib.get_close_matches(dashed.replace("-", "_"), known, 1)
    return close[0] if close else None
