"""Settings of answers: how tokens are chosen, and how the base is held that chooses them."""

from qlora_cli.frozen import frozen
from qlora_cli.settings.groups import NAME, SEED, QuantizationSettings
from qlora_cli.settings.ranges import Numbers, Words
from qlora_cli.settings.setting import MEMORY, QUANTIZATION, RUN, SAMPLING, Settings, setting


@frozen(kw_only=True)
class SamplingSettings(Settings):
    """How tokens are chosen, and where an answer ends."""

    max_new_tokens: int = setting(256, "Longest answer, in tokens.", panel=SAMPLING, range=Numbers(1, 2**20))
    temperature: float = setting(0.7, "Sampling temperature; 0 is greedy.", panel=SAMPLING, range=Numbers(0, 100))
    top_p: float = setting(
        0.95,
        "Sample among the likeliest tokens that hold this share of probability.",
        panel=SAMPLING,
        range=Numbers(0, 1, open_low=True),
        needs="temperature",
    )
    top_k: int = setting(
        0,
        "Sample among the K likeliest tokens; 0 turns it off.",
        panel=SAMPLING,
        range=Numbers(0, 2**31),
        needs="temperature",
    )
    min_p: float = setting(
        0.0,
        "Drop tokens below this share of the likeliest one's probability.",
        panel=SAMPLING,
        range=Numbers(0, 1),
        needs="temperature",
    )
    repetition_penalty: float = setting(
        1.0, "Divide the logits of tokens already seen by this.", panel=SAMPLING, range=Numbers(0, 100, open_low=True)
    )
    stop: tuple[str, ...] | None = setting(
        None,
        "Text at which the answer ends; may be given several times.",
        panel=SAMPLING,
        repeated=True,
        range=Words(4096, lines=True),
    )
    seed: int | None = setting(None, "Seed of sampling.", panel=SAMPLING, range=SEED)


@frozen(kw_only=True)
class GenerationSettings(QuantizationSettings, SamplingSettings):
    """How the base is held, and how answers are made."""

    quant_type: str = setting(
        "nf4",
        "4-bit data type of the base; none leaves its weights as they are stored.",
        panel=QUANTIZATION,
        choices=("nf4", "fp4", "none"),
    )
    raw: bool = setting(False, "Give the prompt to the model as it is, without the trained format.", panel=RUN)
    template_setting: tuple[str, ...] | None = setting(
        None,
        "Variable of the chat template, as name=value, over those of the training; may be given several times.",
        panel=RUN,
        repeated=True,
        range=NAME,
    )
    batch_size: int = setting(8, "Prompts answered at once.", panel=RUN, range=Numbers(1, 4096))
    prompt_lookup: str = setting(
        "auto",
        "Guess tokens of an answer that repeat the prompt, several at a step; auto where that changes no bit of it.",
        panel=MEMORY,
        choices=("auto", "on", "off"),
        needs="engine=fast",
    )
    engine: str = setting("fast", "plain uses transformers' own generate.", panel=MEMORY, choices=("fast", "plain"))
