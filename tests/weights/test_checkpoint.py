"""Checkpoint: each of its weights once, whatever files they lie in."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.errors import ModelError

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write(directory, *files):
    index = {name: file for file, tensors in zip(NAMES, files, strict=True) for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file, tensors in zip(NAMES, files, strict=True):
        save_file(tensors, directory / file)


def test_a_weight_in_two_files_is_one(tmp_path):
    a, b, c = torch.eye(3), torch.ones(2), torch.zeros(2)
    write(tmp_path, {"a": a, "b": b}, {"a": a, "c": c})
    with Checkpoint(tmp_path) as checkpoint:
        assert [list(file.entries) for file in checkpoint.files] == [["b"], ["a", "c"]]
        assert torch.equal(checkpoint.read("a"), a) and torch.equal(checkpoint.read("b"), b)


@pytest.mark.parametrize("other", [torch.ones(3, 3), torch.eye(3, 2), torch.eye(3).bfloat16()])
def test_a_weight_with_other_values_in_each_of_two_files_is_refused(tmp_path, other):
    """As where files of two models lie in one directory: which of them is meant is not to be known."""
    write(tmp_path, {"a": torch.eye(3), "b": torch.ones(2)}, {"a": other})
    with pytest.raises(ModelError, match=f"a stands in {NAMES[0]} and in {NAMES[1]} of .*, with other values"):
        Checkpoint(tmp_path)
