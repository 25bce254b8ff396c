"""Files made to run code or to hang: none is executed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, sha256_of
from qlora_cli.commands.train import train
from qlora_cli.config import TrainConfig
from qlora_cli.core.adapters.lora import load_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.storage.checkpoint import MANIFEST, manifest_digest, newest_valid
from qlora_cli.core.training.state import REQUIRED_FILES
from qlora_cli.errors import AdapterError, DataError, ModelError, QloraError
from qlora_cli.settings.groups import QuantizationSettings

from .conftest import count

CPU = torch.device("cpu")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "executed"))


@pytest.fixture
def canary(tmp_path):
    """A path that hostile code writes to; counted at the end."""
    path = tmp_path / "canary"
    yield path
    count("hostile files", cases=1, executed=int(path.exists()))
    assert not path.exists()


def plant(directory: Path, canary: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_bytes(pickle.dumps(Bomb(canary)))


def test_the_bomb_goes_off_where_pickle_is_read(tmp_path):
    plant(tmp_path, tmp_path / "fuse", "weights.bin")
    pickle.loads((tmp_path / "weights.bin").read_bytes())
    assert (tmp_path / "fuse").exists()


def test_pickle_weights_in_an_adapter_directory_are_refused(tmp_path, canary, load_tiny):
    base, _ = load_tiny("llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    plant(adapter, canary, "adapter_model.bin", "adapter_model.pt", "training_args.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(base, adapter)
    plant(adapter, canary, ADAPTER_WEIGHTS)  # a pickle under the name of a safetensors file
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(base, adapter)


def test_pickle_weights_of_a_base_are_refused(tmp_path, canary, tiny_model):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model, canary, "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_base(
            resolve_model(str(model)), QuantizationSettings(base_cache=False), compute_dtype=torch.float32, device=CPU
        )


def test_code_that_a_configuration_names_is_not_run(tmp_path, canary, tiny_model):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(canary)!r}).write_text('executed')\n"
    code += "from transformers import PretrainedConfig as Evil, LlamaForCausalLM as EvilModel\n"
    (model / "evil.py").write_text(code)
    content = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": "evil.Evil"}
    for model_type in ("llama", "evil"):
        (model / "config.json").write_text(json.dumps(content | {"auto_map": auto_map, "model_type": model_type}))
        for name in ("config", "tokenizer"):
            try:
                getattr(resolve_model(str(model)), name)
            except QloraError as error:
                assert "--trust-remote-code" in f"{error.message} {error.hint}" or model_type == "evil"
        try:
            load_base(
                resolve_model(str(model)),
                QuantizationSettings(base_cache=False),
                compute_dtype=torch.float32,
                device=CPU,
            )
        except QloraError:
            assert model_type == "evil"


@pytest.mark.parametrize("template", ["{% for i in range(10**12) %}{% endfor %}x", "{{ 'x' * 10**11 }}"])
def test_a_template_that_never_ends_is_stopped(tmp_path, canary, tiny_model, template):
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "loop.jinja").write_text(template)
    config = TrainConfig(
        model=str(tiny_model("llama")),
        data=str(data),
        chat_template=str(tmp_path / "loop.jinja"),
        output=str(tmp_path / "out"),
        max_steps=1,
    )
    with pytest.raises((DataError, ModelError)):
        train(config, [].append)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "checkpoints/../x"])
def test_a_manifest_that_names_files_outside_is_refused(tmp_path, canary, name):
    root = tmp_path / "checkpoints"
    (root / "step-00000001").mkdir(parents=True)
    outside = tmp_path / "secret"
    save_file({"x": torch.zeros(1)}, outside)
    entry = {"bytes": outside.stat().st_size, "sha256": sha256_of(outside)}
    manifest = {"format": 1, "step": 1, "identity": {}, "files": {name: entry}}
    (root / "step-00000001" / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    found, skipped = newest_valid(root, REQUIRED_FILES)
    assert found is None and "not a plain file name" in skipped[0].reason


def test_pickles_planted_in_a_checkpoint_are_not_read(zygote, make_run, tmp_path, canary):
    run = make_run(tmp_path / "out")
    zygote.train(run.options, {"kind": "killed_after", "step": 3})
    plant(run.checkpoints[-1], canary, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    plant(run.output, canary, "training_args.bin", "adapter_model.bin")
    done = zygote.train({**run.options, "resume": True})
    assert done.code == 0 and run.equals_reference(), done.said
