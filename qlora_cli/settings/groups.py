"""Groups of settings that commands share: name, type, default, range and meaning of each, once."""

from qlora_cli.frozen import frozen
from qlora_cli.settings.ranges import Memory, Numbers, RopeScaling, WordOrNumber, Words
from qlora_cli.settings.setting import (
    ADAPTER,
    DATA,
    FREE,
    MEMORY,
    MODEL,
    OPTIMISATION,
    QUANTIZATION,
    RESOLVED,
    ROUNDING,
    SAME,
    Settings,
    setting,
)

NAME = Words()  # of a file, a directory, a column, a module, or on the hub
COLUMN_FLAGS = "--text-column, --prompt-column with --completion-column, or --messages-column"  # as hints name them
WHOLE = ("text_column", "messages_column")  # columns that are all of a row
COLUMNS = (*WHOLE, "prompt_column", "completion_column", "template")
SEED = Numbers(0, 2**63 - 2**40)  # with room for the ranks' own

OPTIMIZERS = (
    "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "paged_lion_8bit", "paged_lion_32bit", "lion_8bit",
    "lion", "sgd", "adafactor",
)  # fmt: skip


@frozen(kw_only=True)
class ModelSettings(Settings):
    """Which base model."""

    model: str | None = setting(
        None, "Hub id or directory of the base model.", panel=MODEL, range=NAME, resume=RESOLVED
    )
    model_revision: str | None = setting(
        None, "Commit, branch or tag of the base model.", panel=MODEL, range=NAME, resume=RESOLVED
    )
    trust_remote_code: bool = setting(
        False,
        "Run code that comes with the model; needs --model-revision with a full commit hash.",
        panel=MODEL,
        recorded=False,
        resume=RESOLVED,
    )
    rope_scaling: str | None = setting(
        None,
        "Scaling of the model's rotary positions, for rows longer than it was trained on: linear:2, dynamic:2, yarn:4 "
        "(the context grows by the factor), or JSON with what a config.json takes. An adapter's is recorded with it.",
        panel=MODEL,
        range=RopeScaling(),
        resume=RESOLVED,
    )


@frozen(kw_only=True)
class QuantizationSettings(Settings):
    """How the base is held in 4 bits."""

    quant_type: str = setting(
        "nf4", "4-bit data type of the base.", panel=QUANTIZATION, choices=("nf4", "fp4"), resume=RESOLVED
    )
    double_quant: bool = setting(
        True,
        "Quantise the quantisation constants too (saves 0.37 bit a parameter).",
        panel=QUANTIZATION,
        resume=RESOLVED,
    )
    compute_dtype: str | None = setting(
        None,
        "Dtype of the arithmetic; by default bfloat16 where the GPU has it, float16 on older ones, float32 on CPU.",
        panel=QUANTIZATION,
        choices=("bfloat16", "float16", "float32"),
        resume=RESOLVED,
    )
    base_cache: bool = setting(
        True,
        "Keep the quantised base on disk, so that the next start does not quantise again.",
        panel=QUANTIZATION,
        flag="--cache/--no-cache",
        resume=FREE,
    )


@frozen(kw_only=True)
class DataSettings(Settings):
    """Where rows come from and how each becomes trained and untrained tokens."""

    data: tuple[str, ...] | None = setting(
        None,
        "Hub id (id:config), file (.json .jsonl .csv .tsv .parquet .txt, also .gz .zst .bz2 .xz), folder, glob, or saved dataset; "
        "NAME:0.3 takes three of ten of its rows; may be given several times.",
        panel=DATA,
        repeated=True,
        range=NAME,
        resume=RESOLVED,
        instead_of=("prepared",),
    )
    split: str = setting("train", "Split of a hub or saved dataset.", panel=DATA, range=NAME, resume=RESOLVED)
    revision: str | None = setting(
        None, "Commit, branch or tag of a hub dataset.", panel=DATA, range=NAME, resume=RESOLVED
    )
    format: str = setting(
        "auto",
        "Format of the rows; auto recognises it and says so.",
        panel=DATA,
        choices=("auto", "text", "prompt", "chat", "tokens"),
        former_name="shape",
        resume=RESOLVED,
    )
    text_column: str | None = setting(
        None, "Column with the text to train on.", panel=DATA, range=NAME, resume=RESOLVED, instead_of=COLUMNS
    )
    prompt_column: str | None = setting(
        None, "Column with the prompt.", panel=DATA, range=NAME, resume=RESOLVED, instead_of=WHOLE
    )
    completion_column: str | None = setting(
        None, "Column with the completion.", panel=DATA, range=NAME, resume=RESOLVED, instead_of=WHOLE
    )
    messages_column: str | None = setting(
        None, "Column with the chats, or their texts.", panel=DATA, range=NAME, resume=RESOLVED, instead_of=COLUMNS
    )
    role: tuple[str, ...] | None = setting(
        None,
        "NAME=ROLE: what a role of this data's conversations is called by chat templates, such as bard=assistant; "
        "may be given several times.",
        panel=DATA,
        repeated=True,
        range=NAME,
        resume=RESOLVED,
        needs="format=chat",
    )
    template: str | None = setting(
        None,
        "Prompt/completion template: text (or a file) with {column} fields, one of them the completion.",
        panel=DATA,
        range=Words(2**20, lines=True),
        resume=RESOLVED,
        instead_of=WHOLE,
    )
    chat_template: str | None = setting(
        None,
        "File with a Jinja chat template to use instead of the model's.",
        panel=DATA,
        range=NAME,
        resume=RESOLVED,
        needs="format=chat",
    )
    template_setting: tuple[str, ...] | None = setting(
        None,
        "Variable of the chat template, as name=value (enable_thinking=false); may be given several times.",
        panel=DATA,
        repeated=True,
        range=NAME,
        resume=RESOLVED,
        needs="format=chat",
    )
    thoughts: str = setting(
        "keep",
        "Thoughts of answers: keep all (a row for each answer, if the chat template shows earlier ones without), "
        "those of the last answer only, or drop them.",
        panel=DATA,
        choices=("keep", "last", "drop"),
        resume=RESOLVED,
        needs="format=chat",
    )
    on_lost_content: str = setting(
        "stop",
        "Stop at a conversation of which the chat template leaves something out, or warn and count.",
        panel=DATA,
        choices=("stop", "warn"),
        resume=RESOLVED,
        needs="format=chat",
    )
    train_on: str | None = setting(
        None,
        "Which tokens are trained: completion (every assistant turn of a chat, but none of a prompt's), the last answer only, or all. "
        "By default completion where there is one, all for text.",
        panel=DATA,
        choices=("all", "completion", "last"),
        resume=RESOLVED,
    )
    max_length: int | None = setting(
        None,
        "Longest row, and pack, in tokens; by default the model's context, at most 2048.",
        panel=DATA,
        range=Numbers(2, 2**20),
        resume=RESOLVED,
    )
    overlong: str = setting(
        "truncate",
        "What happens to a row past --max-length.",
        panel=DATA,
        choices=("truncate", "drop", "split"),
        resume=RESOLVED,
    )
    on_bad_row: str = setting(
        "stop",
        "Stop at a row that cannot be read, or skip and list it.",
        panel=DATA,
        choices=("stop", "skip"),
        resume=RESOLVED,
    )
    max_line_bytes: int = setting(
        16 * 2**20,
        "Longest line accepted in a text file, in bytes.",
        panel=DATA,
        range=Numbers(1, 2**30),
        resume=RESOLVED,
    )
    limit: int | None = setting(
        None, "Use only the first N rows.", panel=DATA, range=Numbers(1, 2**62), resume=RESOLVED
    )


@frozen(kw_only=True)
class LoraSettings(Settings):
    """The adapter."""

    rank: int = setting(16, "LoRA rank r.", panel=ADAPTER, range=Numbers(1, 8192), resume=SAME)
    alpha: float = setting(
        32,
        "LoRA alpha: the update is scaled by alpha/rank (alpha/sqrt(rank) with --rslora).",
        panel=ADAPTER,
        range=Numbers(0, 1e6, open_low=True),
        resume=SAME,
    )
    dropout: float = setting(
        0.0, "Dropout on the adapter's input, 0 to 1.", panel=ADAPTER, range=Numbers(0, 1, open_high=True), resume=SAME
    )
    target_modules: tuple[str, ...] | None = setting(
        None,
        "Comma-separated modules to adapt: names, ends of names, modules that hold them (mlp, experts), regular "
        "expressions of whole names, or all-linear, the default: every linear layer but the head.",
        panel=ADAPTER,
        range=NAME,
        resume=SAME,
    )
    exclude_modules: tuple[str, ...] | None = setting(
        None,
        "Comma-separated modules left unadapted, named as for --target-modules.",
        panel=ADAPTER,
        range=NAME,
        resume=SAME,
    )
    adapt_experts: bool = setting(
        False,
        "Adapt the routed experts of a mixture-of-experts model too, each with a rank of its own.",
        panel=ADAPTER,
        resume=SAME,
    )
    expert_rank: int | None = setting(
        None,
        "Rank an expert gets with --adapt-experts; by default --rank over the experts a token meets, at least 1. Their "
        "update is scaled as every other.",
        panel=ADAPTER,
        range=Numbers(1, 8192),
        resume=SAME,
    )
    rank_pattern: tuple[str, ...] | None = setting(
        None,
        "Ranks of their own, comma-separated: q_proj=8,layers.0.mlp.up_proj=32.",
        panel=ADAPTER,
        range=NAME,
        resume=SAME,
    )
    alpha_pattern: tuple[str, ...] | None = setting(
        None, "Alphas of their own, named as for --rank-pattern.", panel=ADAPTER, range=NAME, resume=SAME
    )
    rslora: bool = setting(False, "Rank-stabilised scaling alpha/sqrt(rank).", panel=ADAPTER, resume=SAME)
    dora: bool = setting(False, "Weight-decomposed adapters (DoRA).", panel=ADAPTER, resume=SAME)
    modules_to_save: tuple[str, ...] | None = setting(
        None,
        "Comma-separated modules trained in full and saved with the adapter.",
        panel=ADAPTER,
        range=NAME,
        resume=SAME,
    )
    init: str = setting(
        "calibrated",
        "Start of the adapter: calibrated answers the error of the 4-bit base as some training rows see it; loftq "
        "answers that of the weights alone; eva takes A from the rows; default and gaussian are random, B zero.",
        panel=ADAPTER,
        choices=("calibrated", "default", "gaussian", "loftq", "eva"),
        resume=SAME,
    )


@frozen(kw_only=True)
class StepSettings(Settings):
    """What one optimizer step is and costs: shared by training and by the memory prediction."""

    batch_size: int = setting(
        1,
        "Rows (packs with --packing) in a micro-batch on one device.",
        panel=OPTIMISATION,
        range=Numbers(1, 65_536),
        resume=SAME,
    )
    gradient_accumulation_steps: int = setting(
        16,
        "Micro-batches in an optimizer step, on all cards together.",
        panel=OPTIMISATION,
        range=Numbers(1, 2**20),
        resume=RESOLVED,
    )
    packing: bool = setting(
        False,
        "Fill each row up to --max-length with several examples that never see one another.",
        panel=DATA,
        flag="--packing/--no-packing",
        resume=SAME,
    )
    optimizer: str | None = setting(
        None,
        "By default paged_adamw_8bit on CUDA, adamw on CPU.",
        panel=OPTIMISATION,
        choices=OPTIMIZERS,
        resume=RESOLVED,
    )
    neftune_noise_alpha: float = setting(
        0.0,
        "NEFTune: alpha of the noise on the embeddings in training, such as 5; 0 is none.",
        panel=OPTIMISATION,
        range=Numbers(0, 1000),
        resume=SAME,
    )
    gradient_checkpointing: str = setting(
        "auto",
        "Recompute activations in the backward pass: auto (as many layers as memory asks for), on, off, "
        "or a number of layers.",
        panel=MEMORY,
        range=WordOrNumber(("auto", "on", "off"), 10_000),
        resume=ROUNDING,
    )
    offload_activations: bool | None = setting(
        None,
        "Keep checkpointed activations in pinned host memory; by default when memory is short.",
        panel=MEMORY,
        resume=ROUNDING,
    )
    offload_embeddings: bool | None = setting(
        None, "Keep the input embeddings on the host; by default when memory is short.", panel=MEMORY, resume=ROUNDING
    )
    tile_tokens: int | None = setting(
        None,
        "Run what treats each token by itself (MLPs, norms) over tiles of so many tokens, so that long rows take less "
        "memory; 0 never, by default where memory asks for it.",
        panel=MEMORY,
        range=Numbers(0, 2**20),
        resume=ROUNDING,
    )
    stream: bool | None = setting(
        None,
        "Keep the layers' 4-bit weights in host memory, from where they stream to the card as they are used; by default "
        "as many as memory asks for.",
        panel=MEMORY,
        flag="--stream/--no-stream",
        resume=ROUNDING,
    )
    resident_weights: bool | None = setting(
        None,
        "Keep the dequantised weights, of experts too, in memory beside the 4-bit ones (same numerics, faster); by default when "
        "memory is plentiful.",
        panel=MEMORY,
        resume=ROUNDING,
    )
    matmul: str = setting(
        "auto",
        "Arithmetic of frozen linear layers and experts: bf16 (the compute dtype), or fp8 for those whose error by it on the "
        "first rows stays below that of 4 bits; needs an Ada, Hopper or later card. auto is fp8 in long runs with 4096 tokens or "
        "more in a micro-batch, where the card has it: faster by a third to a half, and 0.004 nats worse on held-out rows of "
        "a model of 135M.",
        panel=MEMORY,
        choices=("auto", "bf16", "fp8"),
        resume=SAME,
    )
    engine: str = setting(
        "fast", "plain turns every fast path off, for comparison.", panel=MEMORY, choices=("fast", "plain"), resume=SAME
    )
    compile: bool | None = setting(
        None,
        "Compile decoder layers; by default where a run is long enough to pay for it.",
        panel=MEMORY,
        resume=ROUNDING,
    )
    vram: str | None = setting(
        None,
        "Memory to keep within, such as 12GiB; by default what is free.",
        panel=MEMORY,
        range=Memory(),
        resume=ROUNDING,
    )
