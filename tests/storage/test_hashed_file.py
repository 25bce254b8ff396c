"""Promises of hashed files: every tensor comes back bit for bit, no damaged byte gets by, and each is read once."""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.core.storage.hashed_file import ALIGNMENT_BYTES, HashedFile, write_hashed_file
from qlora_cli.core.storage.safetensors_file import DTYPE_NAMES
from qlora_cli.errors import RunError

CPU = torch.device("cpu")
PIECE_BYTES = 1000  # no multiple of what tensors are aligned to


def random_tensor(dtype, shape, seed):
    """A tensor of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def write(path, tensors, piece_bytes=PIECE_BYTES):
    with path.open("wb") as stream:
        return write_hashed_file(stream, tensors, iter(tensors.values()), piece_bytes=piece_bytes)


def read(path, digests, piece_bytes=PIECE_BYTES, device=CPU, threads=3):
    with HashedFile(path, digests, piece_bytes) as file:
        tensors = {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in file.entries.items()}
        file.fill([(file.entries[name].start, tensor) for name, tensor in tensors.items()], device, threads=threads)
    return tensors


def same_bits(ours, theirs):
    bits = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*bits)


SHAPES = st.one_of(
    st.just(()), st.tuples(st.integers(0, 3000)), st.tuples(st.integers(0, 40), st.just(1), st.integers(1, 20))
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), max_size=9),
    piece_bytes=st.sampled_from([97, 256, 1000, 4096, 10**6]),
)
def test_tensors_of_any_size_come_back_bit_for_bit(layout, piece_bytes, tmp_path):
    tensors = {f"t{index}": random_tensor(dtype, shape, index) for index, (dtype, shape) in enumerate(layout)}
    digests = write(tmp_path / "file", tensors, piece_bytes)
    again = read(tmp_path / "file", digests, piece_bytes)
    assert list(again) == list(tensors)
    assert all(same_bits(again[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 5000), min_size=2, max_size=6))
def test_parts_of_tensors_can_be_asked_for(cuts, tmp_path):
    whole = random_tensor(torch.uint8, (5000,), 0)
    digests = write(tmp_path / "file", {"before": torch.ones(3), "whole": whole, "behind": torch.ones(3)})
    with HashedFile(tmp_path / "file", digests, PIECE_BYTES) as file:
        start = file.entries["whole"].start
        spans = list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
        parts = [torch.empty(high - low, dtype=torch.uint8) for low, high in spans]
        file.fill([(start + low, part) for (low, _), part in zip(spans, parts, strict=True)], CPU, threads=3)
    assert all(torch.equal(part, whole[low:high]) for (low, high), part in zip(spans, parts, strict=True))


@pytest.fixture
def written(tmp_path):
    """A file of small tensors and one that spans pieces, its digests, and its places that differ in kind."""
    tensors = {"small": torch.arange(7), "spans": random_tensor(torch.bfloat16, (1700,), 1), "last": torch.ones(5)}
    path = tmp_path / "file"
    digests = write(path, tensors)
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    regions = [(0, 8), (8, 8 + header_bytes)]
    regions += [(8 + header_bytes + start, 8 + header_bytes + end) for start, end in offsets]  # padding is among them
    regions += [(start, min(start + PIECE_BYTES, len(content))) for start in range(0, len(content), PIECE_BYTES)]
    return (
        path,
        digests,
        content,
        sorted({place for low, high in regions for place in (low, (low + high) // 2, high - 1)}),
    )


def test_a_changed_bit_in_any_region_is_found_and_its_place_named(written):
    path, digests, content, places = written
    assert len(digests) > 4 and len(places) > 20
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=f"file is damaged after byte {place // PIECE_BYTES * PIECE_BYTES:,}"):
            read(path, digests)
    path.write_bytes(content)
    read(path, digests)


def test_another_length_is_found(written):
    path, digests, content, places = written
    for length in [*places, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"another length|is damaged"):
            read(path, digests)
    for more in (1, PIECE_BYTES - len(content) % PIECE_BYTES, 3 * PIECE_BYTES):
        path.write_bytes(content + bytes(more))
        with pytest.raises(RunError, match=r"another length|is damaged"):
            read(path, digests)


def test_a_file_that_fills_its_last_piece_may_not_grow(tmp_path):
    path = tmp_path / "file"
    tensors = {"full": random_tensor(torch.uint8, (3 * ALIGNMENT_BYTES,), 0)}
    digests = write(path, tensors, ALIGNMENT_BYTES)
    assert path.stat().st_size % ALIGNMENT_BYTES == 0
    assert same_bits(read(path, digests, ALIGNMENT_BYTES)["full"], tensors["full"])
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RunError, match="is damaged"):
        read(path, digests, ALIGNMENT_BYTES)


def test_every_byte_is_read_once_but_those_of_the_header(written, monkeypatch):
    path, digests, content, _ = written
    header_pieces = -(-(8 + int.from_bytes(content[:8], "little")) // PIECE_BYTES)
    preadv, counts = os.preadv, []

    def counted(descriptor, buffers, offset):
        short = [buffers[0][:700]]  # the system may give less than was asked for
        counts.append(preadv(descriptor, short, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    read(path, digests)
    assert sum(counts) == len(content) + header_pieces * PIECE_BYTES


def test_a_file_cut_while_it_is_read_is_reported(written):
    path, digests, content, _ = written
    with HashedFile(path, digests, PIECE_BYTES) as file:
        os.truncate(path, len(content) - 1)
        with pytest.raises(RunError, match="became shorter"):
            file.fill([], CPU)


def test_after_a_failure_and_after_ctrl_c_no_thread_works_on_and_nothing_is_held(written, monkeypatch):
    path, digests, *_ = written
    threads = threading.active_count()
    held = torch.empty(1700, dtype=torch.bfloat16)
    reference = weakref.ref(held)
    gc.disable()
    try:
        with HashedFile(path, [*digests[:-1], "0"], PIECE_BYTES) as file:
            try:
                file.fill([(file.entries["spans"].start, held)], CPU, threads=3)
                raise AssertionError("damage went unnoticed")
            except RunError as error:
                error.__traceback__ = None  # as `restore_base` does, so that quantising again has the memory
        del held
        assert reference() is None
    finally:
        gc.enable()

    preadv, first, interrupted, main = os.preadv, iter([True]), threading.Event(), threading.main_thread()

    def waits_for_threads():
        stack = traceback.extract_stack(sys._current_frames()[main.ident])
        return any("concurrent" in frame.filename and frame.name == "wait" for frame in stack)

    def interrupt(*_):
        interrupted.set()
        raise KeyboardInterrupt

    def interrupting(*arguments):
        if threading.current_thread() is not main:  # which has read the header
            if next(first, False):
                while not waits_for_threads():
                    time.sleep(0.001)
                signal.pthread_kill(main.ident, signal.SIGINT)
            interrupted.wait()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", interrupting)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            read(path, digests)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted.is_set() and threading.active_count() == threads


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [1000, 2**20, 2**23])
def test_a_cuda_device_gets_the_same_bits_and_never_before_its_earlier_work(piece_bytes, tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = (0, 1, 255, 1003, 70_001, 1_000_000) if piece_bytes == 1000 else (0, 1, 70_001, 5_000_003, 40_000_000)
    layout = [(dtype, (size // dtype.itemsize,)) for size in sizes for dtype in DTYPE_NAMES]
    tensors = {f"t{index}": random_tensor(dtype, shape, index) for index, (dtype, shape) in enumerate(layout)}
    digests = write(tmp_path / "file", tensors, piece_bytes)
    for _ in range(3):
        # Memory that is written late on the current stream, and given away before that has happened.
        busy = [
            torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device=device)
            for tensor in tensors.values()
        ]
        torch.cuda._sleep(10**8)
        for block in busy:
            block.fill_(7)
        del block, busy
        again = read(tmp_path / "file", digests, piece_bytes, device, threads=8)
        sums = {name: tensor.clone() for name, tensor in again.items()}  # on the current stream, at once
        assert all(same_bits(sums[name], tensor) for name, tensor in tensors.items())
        assert all(tensor.device == device for tensor in again.values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in again.values() if tensor.numel()}) == sum(
            tensor.numel() > 0 for tensor in tensors.values()
        )
        del again, sums
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        read(tmp_path / "file", digests, piece_bytes, device, threads=8)
    kept = torch.full((10**8,), 3, dtype=torch.uint8, device=device)  # no late copy may land in it
    torch.cuda.synchronize()
    assert bool((kept == 3).all())
