"""Settings of every command, each once: the groups it shares with others, and its own.

The command line, `run.yaml` and `--help` are all made from these dataclasses. A field's metadata carries the help
text and, where there are any, the allowed values.
"""

from qlora_cli.frozen import frozen
from qlora_cli.settings.generation import GenerationSettings
from qlora_cli.settings.groups import (
    NAME,
    SEED,
    DataSettings,
    LoraSettings,
    ModelSettings,
    QuantizationSettings,
    StepSettings,
)
from qlora_cli.settings.ranges import Numbers, Words
from qlora_cli.settings.setting import (
    CALL,
    DATA,
    EVALUATION,
    FREE,
    MEMORY,
    MODEL,
    OPTIMISATION,
    RESOLVED,
    ROUNDING,
    RUN,
    SAME,
    setting,
)

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
)


@frozen(kw_only=True)
class PrepareConfig(ModelSettings, DataSettings):
    """`qlora prepare`: records to a prepared directory."""

    output: str = setting("prepared", "Directory for the prepared rows.", panel=RUN, range=NAME)
    show: int = setting(
        1, "Print N rows, their trained tokens marked.", panel=RUN, recorded=False, range=Numbers(0, 10**6)
    )
    verbose: bool = setting(
        False, "Show rows whole, and every count and setting of the prepared set.", panel=RUN, recorded=False
    )
    overwrite: bool = setting(False, "Replace what is in --output.", panel=RUN, recorded=False)
    workers: int | None = setting(
        None, "Processes that read and tokenise; by default one a core.", panel=RUN, range=Numbers(1, 1024)
    )


@frozen(kw_only=True)
class TrainConfig(ModelSettings, DataSettings, LoraSettings, QuantizationSettings, StepSettings):
    """`qlora train`: a base model and rows to a run directory."""

    prepared: str | None = setting(
        None,
        "Directory written by `qlora prepare`, instead of --data.",
        panel=DATA,
        range=NAME,
        resume=RESOLVED,
        instead_of=("data",),
    )
    output: str = setting("out", "Run directory.", panel=RUN, range=NAME, resume=FREE)
    max_steps: int | None = setting(
        None,
        "Optimizer steps; by default as many as --epochs takes.",
        panel=OPTIMISATION,
        range=Numbers(1, 10**9),
        resume=RESOLVED,
        instead_of=("epochs",),
    )
    epochs: float = setting(
        1.0,
        "Passes over the rows.",
        panel=OPTIMISATION,
        range=Numbers(1e-6, 1e6),
        resume=RESOLVED,
        instead_of=("max_steps",),
        beside="max_steps",
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate; by default 2e-4, and 1e-4 above 15 billion parameters.",
        panel=OPTIMISATION,
        range=Numbers(0, 1, open_low=True),
        resume=SAME,
    )
    loraplus_lr_ratio: float = setting(
        1.0,
        "LoRA+: learning rate of the adapter's B over that of A and all else, such as 16.",
        panel=OPTIMISATION,
        range=Numbers(1, 10_000),
        resume=SAME,
    )
    scheduler: str = setting("cosine", "Learning-rate schedule.", panel=OPTIMISATION, choices=SCHEDULERS, resume=SAME)
    warmup_steps: int | None = setting(
        None,
        "Steps of linear warm-up; overrides --warmup-ratio.",
        panel=OPTIMISATION,
        range=Numbers(0, 10**9),
        resume=RESOLVED,
        instead_of=("warmup_ratio",),
    )
    warmup_ratio: float = setting(
        0.03,
        "Share of the steps used for warm-up.",
        panel=OPTIMISATION,
        range=Numbers(0, 1),
        resume=RESOLVED,
        instead_of=("warmup_steps",),
        beside="warmup_steps",
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", panel=OPTIMISATION, range=Numbers(0, 1), resume=SAME)
    max_grad_norm: float = setting(
        1.0,
        "Gradient norm is clipped to this; 0 turns clipping off.",
        panel=OPTIMISATION,
        range=Numbers(0, 1e9),
        resume=SAME,
    )
    eval_fraction: float | None = setting(
        None,
        "Share of the rows held out for evaluation; by default, from 1,000 rows on, 2 % but at most 200 rows.",
        panel=EVALUATION,
        range=Numbers(0, 1, open_high=True),
        resume=SAME,
        instead_of=("eval_rows",),
        beside="eval_rows",
    )
    eval_rows: int | None = setting(
        None,
        "Number of rows held out, instead of a share.",
        panel=EVALUATION,
        range=Numbers(0, 2**62),
        resume=SAME,
        instead_of=("eval_fraction",),
    )
    eval_every: int | None = setting(
        None,
        "Evaluate every N steps; by default at the end of each epoch.",
        panel=EVALUATION,
        range=Numbers(1, 10**9),
        resume=SAME,
    )
    save_every: int | None = setting(
        None,
        "Checkpoint every N steps; by default ten times a run.",
        panel=EVALUATION,
        range=Numbers(1, 10**9),
        resume=FREE,
    )
    keep: int = setting(2, "Checkpoints kept.", panel=EVALUATION, range=Numbers(1, 10_000), resume=FREE)
    keep_best: bool = setting(
        False, "The adapter saved at the end is the one with the lowest evaluation loss.", panel=EVALUATION, resume=SAME
    )
    patience: int | None = setting(
        None, "Stop after N evaluations without a better loss.", panel=EVALUATION, range=Numbers(1, 10**9), resume=SAME
    )
    seed: int = setting(
        42,
        "Seed of initialisation, order, dropout, and of which rows are held out.",
        panel=RUN,
        range=SEED,
        resume=SAME,
    )
    report_to: str | None = setting(
        None, "Also log to this tracker.", panel=RUN, choices=("tensorboard", "wandb", "mlflow", "trackio"), resume=FREE
    )
    sample_prompt: tuple[str, ...] | None = setting(
        None,
        "A question that the model answers before and after training; may be given several times.",
        panel=EVALUATION,
        repeated=True,
        range=Words(2**16, lines=True),
        resume=FREE,
    )
    sample_every: int | None = setting(
        None,
        "Answer --sample-prompt every N steps too.",
        panel=EVALUATION,
        range=Numbers(1, 10**9),
        resume=FREE,
        needs="sample_prompt",
    )
    resume: bool = setting(
        False, "Go on from the newest checkpoint that verifies.", panel=RUN, recorded=False, resume=CALL
    )
    allow_changes: bool = setting(
        False,
        "Resume although base, data or settings differ from the checkpoint's.",
        panel=RUN,
        recorded=False,
        resume=CALL,
        needs="resume",
    )
    overwrite: bool = setting(
        False, "Start anew although --output holds a run; it is removed.", panel=RUN, recorded=False, resume=CALL
    )
    dry_run: bool = setting(False, "Print the plan and stop.", panel=RUN, recorded=False, resume=CALL)
    gpus: int | None = setting(
        None, "Cards of this machine to train on.", panel=RUN, range=Numbers(1, 1024), resume=ROUNDING
    )
    shard: bool | None = setting(
        None,
        "Shard the 4-bit base over the cards, each holding a share; by default where one card cannot hold it.",
        panel=MEMORY,
        resume=ROUNDING,
    )
    context_parallel: int | None = setting(
        None,
        "Cards that share the tokens of each row; by default more than one only where a row does not fit one card.",
        panel=MEMORY,
        range=Numbers(1, 64),
        resume=ROUNDING,
    )
    shard_offload: bool = setting(False, "With --shard: the shares wait in host memory.", panel=MEMORY, resume=ROUNDING)


@frozen(kw_only=True)
class MergeConfig(ModelSettings):
    """`qlora merge`: a run to a plain transformers checkpoint."""

    adapter: str = setting("out", "Run directory or PEFT adapter.", panel=RUN, range=NAME)
    output: str = setting("merged", "Directory for the merged model.", panel=RUN, range=NAME)
    base: str = setting(
        "auto",
        "Merge into the weights that were trained against, or into the original ones; auto takes those of the lower "
        "loss on rows held out from training, else on rows trained on.",
        panel=RUN,
        choices=("auto", "dequantized", "original"),
    )
    dtype: str | None = setting(
        None,
        "Dtype of the merged weights; by default the checkpoint's 16-bit one.",
        panel=RUN,
        choices=("bfloat16", "float16", "float32"),
    )
    format: str = setting(
        "transformers",
        "gguf writes model.gguf and an Ollama Modelfile beside the checkpoint; needs qlora-cli[gguf].",
        panel=RUN,
        choices=("transformers", "gguf"),
    )
    gguf_type: str = setting(
        "f16", "Numbers of model.gguf.", panel=RUN, choices=("f32", "f16", "bf16", "q8_0"), needs="format=gguf"
    )
    quantize: bool = setting(False, "Write a 4-bit checkpoint instead of a 16-bit one.", panel=RUN)
    min_kept: float = setting(
        0.9,
        "With --quantize: share of the fine-tune's gain below which the merge fails, 0 to 1.",
        panel=RUN,
        range=Numbers(-10, 10),
        needs="quantize",
    )
    verify: bool | None = setting(
        None, "Compare the merged model with base + adapter; by default where a model fits in memory.", panel=RUN
    )
    max_kl: float | None = setting(
        None,
        "Mean KL divergence, in nats a token, past which --verify fails; by default 0.01, and with --quantize or "
        "--base original, which lose more by nature, no limit.",
        panel=RUN,
        range=Numbers(0, 1e6),
    )
    push: str | None = setting(None, "Upload to this hub repository (ORG/NAME).", panel=RUN, range=NAME)
    public: bool = setting(False, "Make the pushed repository public.", panel=RUN, needs="push")
    overwrite: bool = setting(False, "Replace what is in --output.", panel=RUN)
    resume: bool = setting(True, "Reuse finished shards of an interrupted merge.", panel=RUN)


@frozen(kw_only=True)
class GenerateConfig(ModelSettings, GenerationSettings):
    """`qlora generate`: a base, maybe with an adapter, and prompts to text."""

    adapter: str | None = setting(None, "Run directory or PEFT adapter.", panel=MODEL, range=NAME)
    input: str | None = setting(None, "JSON Lines file of prompts.", panel=RUN, range=NAME)
    output: str | None = setting(None, "JSON Lines file for the answers.", panel=RUN, range=NAME)
    chat: bool = setting(False, "Hold a conversation.", panel=RUN)
    markdown: bool = setting(False, "Draw answers as Markdown on a terminal, paragraph by paragraph.", panel=RUN)
    verbose: bool = setting(False, "Say which decoding path is used and how fast it was.", panel=RUN)


@frozen(kw_only=True)
class InspectConfig(ModelSettings, DataSettings, LoraSettings, QuantizationSettings, StepSettings):
    """`qlora inspect`: facts on a model, on what 4 bits cost it on some rows, an adapter, a run, a prepared set or this
    machine."""

    adapter: str | None = setting(None, "Run directory or PEFT adapter.", panel=MODEL, range=NAME)
    prepared: str | None = setting(None, "Directory written by `qlora prepare`.", panel=MODEL, range=NAME)
    max_length: int | None = setting(
        None, "Tokens in a row, for the memory prediction and --data.", panel=MEMORY, range=Numbers(2, 2**20)
    )
    picture: str | None = setting(
        None, "With several runs: also draw their losses into this file (.png, .svg, .pdf).", panel=RUN, range=NAME
    )
    quantization_error: bool = setting(False, "Measure the 4-bit error of each layer (reads the weights).", panel=RUN)
