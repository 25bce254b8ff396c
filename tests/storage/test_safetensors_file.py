"""Safetensors files: read as the library reads them, written so that it reads them; damaged headers are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_cli.core.inspection.weight_stats import group_tensors
from qlora_cli.core.models.identity import weights_digest
from qlora_cli.core.storage.safetensors_file import DTYPES, TensorFile, bytes_of, list_weight_files, make_header
from qlora_cli.core.storage.safetensors_header import HEADER_LIMIT_BYTES, PADDING, header_bytes
from qlora_cli.errors import ModelError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]

tensors = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__" and not PADDING.fullmatch(name)
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
        assert file.header.metadata == {"some": "thing"}
        assert set(file.entries) == set(contents)
        for name, expected in contents.items():
            assert torch.equal(file.read(name), expected)
            if expected.ndim and expected.shape[0] > 1:
                assert torch.equal(file.read(name, slice(1, expected.shape[0])), expected[1:])


@settings(max_examples=40, deadline=None)
@given(tensors, st.sampled_from([1, 8, 256]))
def test_a_file_with_a_header_of_ours_is_one_the_library_reads(tmp_path_factory, plan, alignment_bytes) -> None:
    path = tmp_path_factory.mktemp("file") / "b.safetensors"
    contents = {name: make(*spec) for name, spec in plan.items()}
    header = make_header(
        ((name, value.dtype, value.shape) for name, value in contents.items()), alignment_bytes=alignment_bytes
    )
    assert list(header.entries) == list(contents)
    with path.open("wb") as stream:
        stream.write(header.content)
        for name, value in contents.items():
            start = header.entries[name].start
            assert start % alignment_bytes == 0
            stream.write(bytes(start - stream.tell()))
            stream.write(bytes_of(value))
    assert path.stat().st_size == header.total_bytes
    assert len(header.content) % 8 == 0
    loaded = {name: value for name, value in load_file(path).items() if not PADDING.fullmatch(name)}
    assert {name: value.tolist() for name, value in loaded.items()} == {n: v.tolist() for n, v in contents.items()}
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_every_dtype_has_the_name_the_library_gives_it(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        save_file({"x": torch.zeros(2, dtype=dtype)}, tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", "pt") as reader:
            assert reader.get_slice("x").get_dtype() == name


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_a_dtype_that_torch_lacks_is_refused_only_once_it_is_read(tmp_path: Path, dtype: str, size: int) -> None:
    header = json.dumps({"a": entry(0, size, [8], dtype), "b": entry(size, size + 8)}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size + 8))
    with safe_open(path, "pt") as reader, TensorFile(path) as file:
        assert reader.get_slice("a").get_dtype() == file.entries["a"].dtype_name == dtype
        assert file.entries["a"].total_bytes == size
        assert file.read("b").tolist() == [0, 0]
        with pytest.raises(ModelError, match=f"a is stored as {dtype}"):
            file.read("a")
    assert [group["dtype"] for group in group_tensors(file.entries.values())] == [dtype, "F32"]
    assert len(weights_digest(tmp_path)) == 64


def refusal(path: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ModelError) as caught:
        TensorFile(path)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(path).startswith(f"{path} is damaged: it")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'} cannot be read: No such file or directory."


def entry(start: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# What is wrong with a header → (its JSON, words of the message). Each file has 16 bytes of data.
DAMAGED = {
    "no JSON": ("{x", "Expecting property name"),
    "no text": (b"\xff\xfe", "codec can't decode"),
    "no object": ("[1]", "not a JSON object"),
    "nested without end": ("[" * 100_000, "nested too deep"),
    "metadata that are none": ({"__metadata__": 3, "a": entry(0, 16, [4])}, "its metadata is not one"),
    "a tensor that is a number": ({"a": 7}, "a lacks a dtype, a shape or two offsets"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "a lacks a dtype"),
    "a shape that is a number": ({"a": entry(0, 16, 4)}, "a lacks a dtype"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, "a lacks a dtype"),
    "an unknown dtype": ({"a": entry(0, 16, [4], "F33")}, "a has the unknown dtype F33"),
    "a dtype that is a list": ({"a": entry(0, 16, [4], ["F32"])}, "unknown dtype"),
    "a negative shape": ({"a": entry(0, 16, [-2, -2])}, "not whole numbers"),
    "a shape of fractions": ({"a": entry(0, 16, [4.0])}, "not whole numbers"),
    "a negative offset": ({"a": entry(-8, 0), "b": entry(0, 16, [4])}, "not whole numbers"),
    "a size that is not the shape's": ({"a": entry(0, 16, [3])}, "a has 16 bytes where its shape needs 12"),
    "an end before the start": ({"a": entry(16, 0, [4])}, "a has -16 bytes"),
    "two tensors in one place": ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, "b begins at byte"),
    "tensors that overlap": ({"a": entry(0, 12, [3]), "b": entry(8, 16)}, "b begins at byte"),
    "a gap": ({"a": entry(0, 4, [1]), "b": entry(8, 16)}, "b begins at byte"),
    "a gap at the start": ({"a": entry(4, 16, [3])}, "a begins at byte"),
    "a name given twice": (f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}', "a begins at byte"),
    "bytes that belong to no tensor": ({"a": entry(0, 12, [3])}, "bytes where its header says"),
    "a tensor past the end": ({"a": entry(0, 2**60, [2**58])}, "bytes where its header says"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    fields, words = DAMAGED[damage]
    text = fields if isinstance(fields, bytes) else fields.encode() if isinstance(fields, str) else None
    text = json.dumps(fields).encode() if text is None else text
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    message = refusal(path)
    assert message.startswith(f"{path} is damaged: ") and message.endswith(".")
    assert words in message


def test_a_header_longer_than_the_file_or_than_the_library_reads_is_refused() -> None:
    def first(length: int) -> bytes:
        return length.to_bytes(8, "little")

    assert header_bytes(first(92), 100) == 100
    assert header_bytes(first(HEADER_LIMIT_BYTES), 2**40) == 8 + HEADER_LIMIT_BYTES
    with pytest.raises(ValueError, match="longer than the file"):
        header_bytes(first(93), 100)
    with pytest.raises(ValueError, match="longer than 100 MiB"):
        header_bytes(first(HEADER_LIMIT_BYTES + 1), 2**40)
    with pytest.raises(ValueError, match="longer than the file"):
        header_bytes(first(2**64 - 1), 2**40)


def test_a_file_cut_while_it_is_read_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(64)}, path)
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelError, match="became shorter"):
            file.read("weight")


def test_a_checkpoint_is_its_single_file_or_what_its_index_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        list_weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    save_file({"b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "stray.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of the 2 weight files .* two\.safetensors"):
        list_weight_files(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert list_weight_files(tmp_path) == ["one.safetensors", "two.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list_weight_files(tmp_path) == ["model.safetensors"]  # as transformers prefers it
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks"):
        list_weight_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        list_weight_files(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "directory.safetensors").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ModelError, match=f"{path} is damaged: [^\\[]*$"):
            TensorFile(path)
