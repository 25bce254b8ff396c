"""Safetensors files: read as the library reads them, laid out so that the library reads them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_cli.core.storage.safetensors_file import DTYPES, TensorFile, bytes_of, checkpoint_files, lay_out
from qlora_cli.errors import ModelError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]

tensors = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(FLOATS + WHOLE), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


def make(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return (torch.rand(shape) * 100).to(dtype)


@settings(max_examples=40, deadline=None)
@given(tensors)
def test_a_file_of_the_library_reads_back_tensor_by_tensor(tmp_path_factory, plan) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    contents = {name: make(*spec) for name, spec in plan.items()}
    save_file(contents, path, metadata={"some": "thing"})
    with TensorFile(path) as file:
        assert file.metadata == {"some": "thing"}
        assert set(file.entries) == set(contents)
        for name, expected in contents.items():
            assert torch.equal(file.read(name), expected)
            if expected.ndim and expected.shape[0] > 1:
                assert torch.equal(file.read(name, slice(1, expected.shape[0])), expected[1:])


@settings(max_examples=40, deadline=None)
@given(tensors)
def test_a_laid_out_file_is_one_the_library_reads(tmp_path_factory, plan) -> None:
    path = tmp_path_factory.mktemp("file") / "b.safetensors"
    contents = {name: make(*spec) for name, spec in plan.items()}
    layout = lay_out([(name, value.dtype, tuple(value.shape)) for name, value in contents.items()])
    with path.open("wb") as stream:
        stream.write(layout.header)
        for name, value in contents.items():
            assert stream.tell() == layout.entries[name].start
            stream.write(bytes_of(value))
    assert path.stat().st_size == layout.total_bytes
    assert len(layout.header) % 8 == 0
    loaded = load_file(path)
    assert {name: value.tolist() for name, value in loaded.items()} == {n: v.tolist() for n, v in contents.items()}
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_every_dtype_has_the_name_the_library_gives_it(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        save_file({"x": torch.zeros(2, dtype=dtype)}, tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", "pt") as reader:
            assert reader.get_slice("x").get_dtype() == name


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="is damaged"):
        TensorFile(path)


def test_a_checkpoint_is_its_single_file_or_what_its_index_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        checkpoint_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    save_file({"b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "stray.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of the 2 weight files .* two\.safetensors"):
        checkpoint_files(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert checkpoint_files(tmp_path) == ["one.safetensors", "two.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert checkpoint_files(tmp_path) == ["model.safetensors"]  # as transformers prefers it
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks"):
        checkpoint_files(tmp_path)
