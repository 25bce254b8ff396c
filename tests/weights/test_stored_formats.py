"""Weights stored in FP8 and MXFP4: their scales belong to them, or they are refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.stored_formats import StoredFormat
from qlora_cli.errors import ModelError

FP8 = StoredFormat("fp8", block=(64, 64))
CODES = torch.ones(320, 128).to(torch.float8_e4m3fn)
SCALES = torch.arange(1.0, 11.0).view(5, 2)


def read(tmp_path, stored, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, stored) as checkpoint:
        return checkpoint.read("w")


def test_each_block_has_the_scale_of_its_place(tmp_path):
    values = read(tmp_path, FP8, {"w": CODES, "w_scale_inv": SCALES})
    assert torch.equal(values, SCALES.repeat_interleave(64, 0).repeat_interleave(64, 1))


@pytest.mark.parametrize(("block", "count"), [(None, 5), (None, 1), ((64, 64), 1), ((64, 128), 5)])
def test_experts_of_a_stack_have_a_scale_each_or_one_for_all(tmp_path, block, count):
    scales = torch.arange(1.0, 1.0 + count).view(count, 1, 1)
    save_file({"w": CODES.view(5, 64, 128), "w_scale_inv": scales}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, StoredFormat("fp8", block=block)) as checkpoint:
        whole = checkpoint.read("w")
        assert torch.equal(whole, scales.expand(5, 64, 128))
        assert torch.equal(checkpoint.read("w", slice(1, 3)), whole[1:3])


@pytest.mark.parametrize("stored", [FP8, StoredFormat("fp8")])
@pytest.mark.parametrize(
    ("codes", "scales"), [(CODES, (320, 1)), (CODES[:, 0].clone(), (5,))], ids=["rows", "no matrix"]
)
def test_scales_that_are_of_no_blocks_are_refused(tmp_path, stored, codes, scales):
    with pytest.raises(ModelError, match=r"^w (is stored quantised|has \d+ scales)"):
        read(tmp_path, stored, {"w": codes, "w_scale_inv": torch.ones(scales)})


@pytest.mark.parametrize(
    "scales",
    [torch.cat([SCALES, SCALES]), SCALES[:-1], SCALES.T.contiguous(), SCALES[:, 0].clone(), SCALES[:0], SCALES.int()],
    ids=["more rows", "fewer rows", "turned", "one of two dimensions", "none", "no numbers of scales"],
)
def test_scales_of_other_blocks_are_refused(tmp_path, scales):
    with pytest.raises(ModelError, match=r"^w is stored quantised, and .*(which do not cover it|is no scale)"):
        read(tmp_path, FP8, {"w": CODES, "w_scale_inv": scales})


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        ((5, 64, 3, 16), (5, 64, 1)),
        ((5, 64, 3, 16), (1, 64, 3)),
        ((5, 64, 3, 16), (5, 64, 6)),
        ((5, 64, 3, 8), (5, 64, 3)),
        ((5, 64, 48), (5, 64, 3)),
    ],
)
def test_exponents_of_other_blocks_are_refused(tmp_path, blocks, scales):
    tensors = {"w_blocks": torch.ones(blocks, dtype=torch.uint8), "w_scales": torch.ones(scales, dtype=torch.uint8)}
    with pytest.raises(ModelError, match=r"^w_blocks is stored quantised, and .* do not belong together"):
        read(tmp_path, StoredFormat("mxfp4"), tensors)


@pytest.mark.parametrize(
    ("stored", "weights", "total_bytes"),
    [
        (FP8, 64 * 64, 64 * 64 + 4),
        (StoredFormat("fp8"), 1, 1),
        (StoredFormat("mxfp4"), 32, 16 + 1),
        (StoredFormat("bitsandbytes", "nf4"), 64, 32 + 4),
        (StoredFormat("bitsandbytes", "nf4", double_quant=True), 256 * 64, 256 * 32 + 256 + 4),
    ],
)
def test_bytes_are_counted_with_what_blocks_have(stored, weights, total_bytes):
    assert weights * stored.bytes_per_weight == total_bytes
