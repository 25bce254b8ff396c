"""Tiny real models and data for the tests: built once a session, on the CPU, in milliseconds."""

import gc
import importlib
import os
import signal
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("QLORA_CACHE", tempfile.mkdtemp(prefix="qlora-test-cache-"))

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from qlora_cli.events import report_nothing

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("repeatable")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Ask not what your country can do for you; ask what you can do for your country.",
    "def add(a, b):\n    return a + b",
    "Question: What is 12 * 7? Answer: 84.",
    "Ünïcödé, naïve café, 東京, Привет, 🙂.",
]

_SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_SMALL, "intermediate_size": 128, "max_position_embeddings": 512}
_GQA = {**_GATED, "num_key_value_heads": 2}

# Architecture → (configuration class, arguments). Shapes are small but each keeps what is peculiar to it.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "gpt_neox": ("GPTNeoXConfig", {**_GATED, "rotary_pct": 0.25, "tie_word_embeddings": False}),
    "llama": ("LlamaConfig", {**_GATED, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "falcon": (
        "FalconConfig",
        {
            **_SMALL,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 512,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **_SMALL,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 512,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", {**_GATED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("Phi3Config", {**_GQA, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}


def make_tokenizer():
    """A byte-level BPE tokenizer with `<|endoftext|>` (id 0) as end and unknown token, no beginning token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>", model_max_length=512
    )


def write_model(directory: Path, architecture: str, *, seed: int = 0, dtype: str = "float32", **changes) -> Path:
    """Writes a random checkpoint of an architecture with its tokenizer, as the hub would hold it.

    Weights are scaled up so that logits, and their differences, are far from rounding.
    """
    import torch
    import transformers

    name, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**{**arguments, **changes}, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.08)
                elif parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Path]:
    """`tiny_model(architecture, **changes)`: directory of a random checkpoint, built once a session. Do not write in it."""
    built: dict[tuple, Path] = {}

    def build(architecture: str = "gpt_neox", *, seed: int = 0, dtype: str = "float32", **changes) -> Path:
        key = (architecture, seed, dtype, repr(sorted(changes.items())))
        if key not in built:
            built[key] = write_model(
                tmp_path_factory.mktemp(architecture) / "model", architecture, seed=seed, dtype=dtype, **changes
            )
        return built[key]

    return build


@pytest.fixture
def load_tiny(tiny_model):
    """`load_tiny(architecture)`: a fresh 4-bit base on the CPU and its identity."""

    def load(architecture: str = "gpt_neox", *, report=report_nothing, compute_dtype=None, device=None, **held):
        import torch

        from qlora_cli.core.models.files import resolve_model
        from qlora_cli.core.models.loading import load_base
        from qlora_cli.settings.groups import QuantizationSettings

        return load_base(
            resolve_model(str(tiny_model(architecture)), report=report),
            QuantizationSettings(**{"base_cache": False, **held}),
            compute_dtype=compute_dtype or torch.float32,
            device=device or torch.device("cpu"),
        )

    return load


PROFILES: dict[str, Any] = {}  # of models, by what was asked
DRAWN: list[bytes] = []  # the first curve


def draw_curves_once(patch: pytest.MonkeyPatch) -> None:
    """Every run gets the loss curve of the first one: drawing is a quarter of what a tiny `train` takes."""
    from qlora_cli.core.runs import metrics

    draw = metrics.draw_losses

    def draw_once(runs, **given):
        if "kind" in given:  # a picture that is asked for
            return draw(runs, **given)
        if not DRAWN:
            DRAWN.append(draw(runs, **given))
        return DRAWN[0]

    patch.setattr(metrics, "draw_losses", draw_once)


@pytest.fixture(scope="module", autouse=True)
def curves():
    """How `loss.png` is drawn; a module that looks at it overrides this."""
    with pytest.MonkeyPatch.context() as patch:
        draw_curves_once(patch)
        yield


@pytest.fixture(scope="module")
def short_runs():
    """Runs of a module go without what takes most of a tiny one's time and is not theirs to show."""
    with pytest.MonkeyPatch.context() as patch:
        leave_gap_out(patch)
        remember_profiles(patch)
        yield


def leave_gap_out(patch: pytest.MonkeyPatch) -> None:
    """What 4 bits cost is not measured on rows held out at a run's end, which takes a third of a tiny one."""
    from qlora_cli.commands import train

    patch.setattr(train, "measure_held_out", lambda *_: None)


def remember_profiles(patch: pytest.MonkeyPatch) -> None:
    """A model is profiled once for all plans that ask the same of it: a profile takes seconds."""
    from qlora_cli.core.inspection import model_summary
    from qlora_cli.core.planning import model_profile, run_plan
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings

    def remember(config, lora, quantization, **settings):
        groups = ((LoraSettings, lora), (QuantizationSettings, quantization))
        asked = [getattr(given, field.name) for kind, given in groups for field in fields(kind)]
        key = repr((config.to_json_string(), config.name_or_path, asked, sorted(settings.items())))
        if key not in PROFILES:
            PROFILES[key] = model_profile.profile_model(config, lora, quantization, **settings)
        return PROFILES[key]

    for module in (model_summary, run_plan):
        patch.setattr(module, "profile_model", remember)


@pytest.fixture(scope="session")
def hub(tiny_model):
    """The only hub that the zygote's children know, and its port: it serves a small Llama as org/model."""
    from tests.faults.hub_server import Hub, serving

    served = Hub(tiny_model("llama"))
    with serving(served) as port:
        yield served, port


@pytest.fixture(scope="session")
def zygote(hub, tmp_path_factory):
    """A process that has imported everything and forks a child for each function it is to run: tests/faults/zygote.py.

    One for all: it takes 10 s of processor time to start. The library that lets file calls fail lies dormant in it.
    """
    from tests.faults.campaign import build_injector
    from tests.faults.conftest import Zygote

    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
    }
    injector = build_injector(tmp_path_factory.mktemp("injector"))
    if injector is not None:
        environment["LD_PRELOAD"] = str(injector)
    started = Zygote(tmp_path_factory.mktemp("zygote"), environment)
    yield started
    started.close()


# What is peculiar to most of them: rotary or learned positions or ALiBi, joined or separate projections, shared heads, caps.
FEW = ("gpt_neox", "llama", "falcon", "gpt2", "bloom", "gemma3")

# Files that take longest: begun first, none of them is what one worker is at when the other has ended.
LONGEST = ("kernels/test_triton.py", "test_survey.py")
LONG = ("commands/test_train.py", "engine/test_cuda_graphs.py", "engine/test_engine.py", "training/test_trainer.py")
LONG += ("commands/test_inspect.py", "commands/test_merge.py", "commands/test_generate.py", "decoding/test_decoder.py")
LONG += ("planning/test_activation_trace.py", "streaming/test_streamed_base.py", "calibration/test_initialization.py")

# Those whose tests ask for the zygote, beside tests/faults: one worker of make test runs them all, with one zygote.
FORKING = ("commands/test_chat_terminal.py", "commands/test_launchers.py", "commands/test_launchers_gpu.py")
FORKING += (
    "commands/test_merge_faults.py",
    "data/test_prepare.py",
    "distributed/test_context_parallel.py",
    "engine/test_fsdp.py",
    "experts/test_sharded_experts.py",
    "merge/test_writer.py",
    "models/test_bnb.py",
    "test_readme_lines.py",
)


def is_forking(file: str) -> bool:
    """Whether tests of a file, tests/…, ask for the zygote."""
    return file.startswith("tests/faults/") or file.removeprefix("tests/") in FORKING


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile` as it is, but for files that ask for the zygote in make test; the long form spreads those too."""
    if config.option.dist != "loadfile" or config.option.markexpr != "not slow":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneZygote(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "those who ask for the zygote" if is_forking(file) else file

    return OneZygote(config, log)


def most_slow(cases, kept):
    """Parameters of a test: of these cases, the ones that are not kept in make test are slow."""
    given = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if case in kept else pytest.param(*values, marks=pytest.mark.slow) for case, values in given]


@pytest.hookimpl(tryfirst=True)  # before those marked slow are left out
def pytest_collection_modifyitems(items):
    """Long tests first, among themselves in order; of a product of parameters all but an each-choice cover is slow."""

    def turn(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        name = file.removeprefix("tests/")
        return 0 if name in LONGEST else 1 if is_forking(file) else 2 if name in LONG else 3

    for item in items:
        file = item.nodeid.partition("::")[0]
        if "zygote" in getattr(item, "fixturenames", ()) and not is_left_out(item) and not is_forking(file):
            raise pytest.UsageError(f"{file} asks for the zygote: name it in FORKING in tests/conftest.py.")
    items.sort(key=turn)
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("each_choice") and hasattr(item, "callspec") and not item.get_closest_marker("gpu"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in products.values():
        kept = each_choice([values_of(case) for case in cases if not is_left_out(case)])
        for case in cases:
            if values_of(case) not in kept:
                case.add_marker("slow")


def values_of(case) -> frozenset[tuple[str, str]]:
    """Each parameter of a test with its value."""
    return frozenset((name, repr(value)) for name, value in case.callspec.params.items())


def each_choice(cases: list[frozenset[tuple[str, str]]]) -> list[frozenset[tuple[str, str]]]:
    """The fewest cases (chosen greedily) among which each value of each parameter occurs: each-choice coverage.

    Ammann and Offutt, Using formal methods to derive test frames in category-partition testing (1994).
    """
    chosen, left = [], frozenset().union(*cases)
    while left:
        chosen.append(max(cases, key=lambda case: len(case & left)))
        left -= chosen[-1]
    return chosen


def is_left_out(item) -> bool:
    """Whether a mark says that the test is not run here, or in the long form alone."""
    conditions = [mark.args[0] for mark in item.iter_markers("skipif")]
    return bool(item.get_closest_marker("slow")) or any(c for c in conditions if not isinstance(c, str))


def pytest_collection(session):
    """What is imported stays: it is not looked through for garbage, now or later, which is a twentieth of the time."""
    gc.disable()
    if getattr(session.config.option, "dist", "no") == "no":  # whoever collects, not who hands out to workers
        importlib.import_module("qlora_cli.core.bnb_before_peft")  # which imports the compiler otherwise, 2 s


def pytest_collection_finish(session):
    """From here on garbage is collected, among what is new."""
    gc.freeze()
    gc.set_threshold(2000, 20, 20)  # the oldest tenth as often: models of tests are small
    gc.enable()


def pytest_unconfigure():
    """At the end all is: bindings of libraries complain of what is left."""
    gc.unfreeze()


def pytest_runtest_setup(item):
    """Tests marked gpu need a CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
