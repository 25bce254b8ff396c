"""Layers that wait in the copy of the base on the disk: the same bits, a few in memory, and what becomes of the file."""

import os
import time

import pytest
import torch

from qlora_cli.artifacts import cache_root
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.models import quantized_cache
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.streaming import host_memory
from qlora_cli.core.streaming.disk_source import STAGED, DiskSource, Extent
from qlora_cli.core.streaming.ring import Ring
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.core.weights.mapped_file import MappedFile
from qlora_cli.errors import ModelError, RunError
from qlora_cli.events import Notice, RunStarted, report_nothing
from qlora_cli.settings.groups import QuantizationSettings
from tests.commands.test_train import data, run, weights  # noqa: F401
from tests.conftest import most_slow
from tests.engine.test_engine import CPU
from tests.streaming.test_streamed_base import LAYERS, assert_equal, directories, load, train  # noqa: F401
from tests.streaming.test_streamed_runs import options  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))


def load_from_disk(directory, **held):
    """A base whose layers stream from its copy, which is made where there is none."""
    base, _ = load_base(
        resolve_model(str(directory), report=report_nothing),
        QuantizationSettings(**held),
        compute_dtype=torch.float32,
        device=CPU,
        weight_shards=WeightShards(ProcessGroup(), on_host=True, in_copy=True),
    )
    return stream_base(base, find_layers(find_decoder(base)), CPU, streamed=LAYERS), base


def copies():
    return sorted(path for path in (cache_root() / "base").rglob("*") if path.is_file())


class SlowFile(MappedFile):
    """A file on a disk that takes its time, and not always the same."""

    def read(self, start, into):
        time.sleep(0.0002 * (start % 3))
        super().read(start, into)


@pytest.mark.parametrize("architecture", most_slow(["llama", "qwen3_moe"], ["llama"]))
def test_from_the_disk_however_slow_come_the_bits_of_a_whole_base(directories, architecture, monkeypatch):  # noqa: F811
    monkeypatch.setattr(quantized_cache, "MappedFile", SlowFile)
    wanted = train(load(directories(architecture)), gradient_checkpointing="2")
    load_from_disk(directories(architecture))  # makes the copy
    streamed, base = load_from_disk(directories(architecture))
    assert streamed.on_disk and streamed.streamed == LAYERS
    assert len(streamed.ring.source.buffers) == STAGED
    assert_equal(train(base, beside=True, gradient_checkpointing="2"), wanted)
    assert [path.name for path in copies()] == ["base.json", "base.safetensors"]  # and nothing beside it


def test_a_copy_that_is_removed_meanwhile_is_read_to_the_end_and_one_cut_short_is_said(directories):  # noqa: F811
    _, base = load_from_disk(directories("llama"))
    path = next(path for path in copies() if path.suffix == ".safetensors")
    kept = path.rename(path.with_suffix(".moved"))
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        first = base(input_ids=ids).logits
        assert torch.equal(base(input_ids=ids).logits, first) and torch.isfinite(first).all()
        os.truncate(kept, 4096)
        with pytest.raises(RunError, match="became shorter"):
            for _ in range(2):  # some layers were read ahead
                base(input_ids=ids)


def test_where_no_copy_can_be_kept_that_is_said(directories):  # noqa: F811
    with pytest.raises(ModelError, match="no copy"):
        load_from_disk(directories("llama"), base_cache=False)


@pytest.mark.parametrize("delay", [0, 0.01])
def test_that_steps_wait_for_the_disk_is_said_once(tmp_path, delay):
    (tmp_path / "layers").write_bytes(bytes(range(40)))
    file, said = MappedFile(tmp_path / "layers"), []
    read = file.read
    file.read = lambda start, into: (time.sleep(delay), read(start, into))
    layers = [[Extent(10 * number, 10, 0)] for number in range(4)]
    source = DiskSource(file, layers, [torch.zeros(10, dtype=torch.uint8) for _ in range(STAGED)], 2, said.append)
    ring = Ring(source, 4, 10, CPU)
    for number in [*range(4), *reversed(range(4))] * 12:
        ring.use(number, 1)
        assert ring.buffers[ring.slot(number)].tolist() == list(range(10 * number, 10 * number + 10))
        if not delay:
            time.sleep(0.002)  # what is computed meanwhile
    if delay:
        assert [type(event) for event in said] == [Notice] and "wait for the disk" in said[0].text
        assert 0 < source.bytes_per_second < 10 / delay * 4


@pytest.mark.slow
def test_a_run_takes_the_disk_where_the_host_has_no_memory(options, tmp_path, monkeypatch):  # noqa: F811
    options |= {"max_steps": 1, "eval_rows": None, "eval_every": None, "sample_prompt": None, "sample_every": None}
    run(options, output=str(tmp_path / "whole"), stream=False)
    monkeypatch.setattr(host_memory, "read_free_bytes", lambda device: 2**30)
    events: list = []
    run(options, events, output=str(tmp_path / "disk"), stream=True)
    assert weights(tmp_path / "disk") == weights(tmp_path / "whole")
    assert any("on the disk" in event.text for event in events if isinstance(event, Notice))
    assert "on the disk" in next(event.engine for event in events if isinstance(event, RunStarted))
