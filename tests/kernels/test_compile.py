"""Kernels compile for a Hopper card, without one: where no GPU finds the mistakes.

All of decoding, and those of training that the interpreter does not run in bfloat16.
"""

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qlora_cli.kernels.decode import attention as decode_attention  # noqa: E402
from qlora_cli.kernels.decode import fused_projections, gemv_lanes, gemv_programs, guesses  # noqa: E402
from qlora_cli.kernels.decode import pointwise as decode_pointwise  # noqa: E402
from qlora_cli.kernels.experts import codes  # noqa: E402
from qlora_cli.kernels.experts import float8 as float8_experts  # noqa: E402
from qlora_cli.kernels.triton import (  # noqa: E402
    block_attention,
    dropout,
    float8,
    gated_tiles,
    low_rank,
    ordered_rounding,
    short_attention,
    thin_products,
)
from tests.conftest import most_slow  # noqa: E402

POINTERS = {
    "packed": "*i32",
    "absmax": "*u8",
    "first_rank": "*i32",
    "positions": "*i64",
    "seed": "*i64",
    "boundaries": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    **dict.fromkeys(("code", "nested_absmax", "nested_code", "nested_offset", "projected", "scaling"), "*fp32"),
    **dict.fromkeys(("parts_out", "highest", "weight", "by_right", "by_left", "left_out"), "*fp32"),
}
FLOATS = {"least", "scale", "softcap", "cap", "epsilon", "offset", "rate"}
NUMBERS = {"rows", "row_words", "ranks", "parts", "tokens", "columns", "capacity", "key_heads", "heads", "window"}
NUMBERS |= {f"{a}_{b}" for a in ("q", "key", "value", "x", "y") for b in ("row", "head", "token")}
NUMBERS |= {"cos_row", "x_group", "group", "x_heads", "y_heads", "row_blocks", "units", "size"}
NUMBERS |= {"gate_row", "up_row"}
NUMBERS |= {"right_parts", "left_parts", "right_elements", "left_elements"}
NUMBERS |= {"given_row", "given_column"}
NUMBERS |= {"width", "first_group", "first_row", "end_row", "x_row"}
NUMBERS |= {"second_columns", "third_columns"}
NUMBERS |= {"elements", "rank", "out_row", "base_row", "left_row", "right_rank", "right_column"}
PRODUCT = {"NESTED_BLOCKSIZE": 256, "RANK": 16, "ROOM": 16, "HAS_BIAS": True, "ROW_UNIT": 64}
FEW = {**PRODUCT, "BLOCKSIZE": 64, "BLOCKS": 2, "SHUFFLE": True}
LANES = {**PRODUCT, "PARTS": 8, "WHOLE": False}
UNPACK = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "NESTED": True, "OFFSETS": False, "ROUNDS": False}
UNPACK |= {"STACKED": False}
STACK = {"NESTED_BLOCKSIZE": 256, "NESTED": True, "OFFSETS": True}
STACK_NUMBERS = {"first_expert", "blocks", "rows", "row_blocks", "experts", "first", "last", "columns", "inner"}
STACK_NUMBERS |= {"choices", "rank", "second_expert_stride", "rank_stride", "second_stride"}
CODE_TILE = {"ROWS": 128, "COLUMNS": 256, "INNER": 128, "EXPERTS": 128, "RANK": 16, "WHOLE": True, "GATHERED": True}
ALONE = {"second": None, "third": None}
GATE_TILE = {"ROWS": gated_tiles.ROWS, "COLUMNS": gated_tiles.COLUMNS}
CASES = [
    (
        gemv_lanes.multiply_lanes,
        {**LANES, "TILES": 1, "EIGHTS": 1, "WARPS": 4, "STAGES": 2, "LATER": "1", "OVERLAP": True, "KIND": "bf16"},
        4,
    ),
    (
        gemv_lanes.multiply_lanes,
        {**LANES, "TILES": 2, "EIGHTS": 2, "WARPS": 2, "STAGES": 2, "LATER": "1", "OVERLAP": False, "KIND": "f16"},
        2,
    ),
    (gemv_programs.multiply_few, {**FEW, "TOKENS": 16, "ROWS": 32}, 4),
    (gemv_programs.multiply_few, {**FEW, "TOKENS": 64, "ROWS": 64}, 4),
    (gemv_programs.project, {"SPAN": 512, "TOKENS": 1, "RANKS": 2, "OVERLAP": True}, 4),
    (gemv_programs.project, {"SPAN": 512, "TOKENS": 64, "RANKS": 16, "OVERLAP": False}, 4),
    (
        decode_attention._attend_part,
        {"GROUP": 4, "GROUP_ROOM": 16, "SIZE": 80, "SIZE_ROOM": 128, "PART": 128, "PARTS": 4, "STEP": 64}
        | {"WINDOW": True, "SOFTCAP": True, "SHARED": False, "OVERLAP": True},
        4,
    ),
    (
        guesses._guess,
        {"LEAST": 2, "LONGEST": 6, "WIDTH": 8, "NOTHING": -1, "BLOCK": guesses.BLOCK},
        8,
    ),
    (guesses._accept, {"WIDTH": 8, "NOTHING": -1}, 1),
    (
        decode_attention._join_parts,
        {"SIZE": 128, "SIZE_ROOM": 128, "PART": 128, "PARTS": 4, "PARTS_ROOM": 4, "WINDOW": True, "OVERLAP": True},
        2,
    ),
    (decode_pointwise._normalise, {"SIZE": 4096, "SIZE_ROOM": 4096, "ROUND_FIRST": True, "OVERLAP": True}, 8),
    (
        fused_projections._normalise_and_project,
        {"SIZE": 4096, "SIZE_ROOM": 4096, "SPAN": 512, "RANKS": 4, "ROUND_FIRST": True, "OVERLAP": True},
        4,
    ),
    (fused_projections._gate_and_project, {"SPAN": 512, "RANKS": 4, "KIND": "silu", "OVERLAP": True}, 4),
    (
        decode_pointwise._add_and_normalise,
        {"SIZE": 4096, "SIZE_ROOM": 4096, "ROUND_FIRST": True, "OVERLAP": True},
        8,
    ),
    (decode_pointwise._centre, {"SIZE": 6144, "SIZE_ROOM": 8192, "HAS_BIAS": True, "OVERLAP": True}, 8),
    (decode_pointwise._gate, {"KIND": "gelu", "ROOM": 1024, "OVERLAP": True}, 4),
    (decode_pointwise._rotate, {"SIZE": 96, "ROTATED": 24, "ROOM": 128, "OVERLAP": True}, 1),
    (dropout._drop, {"GROUPS": 512}, 4),
    (low_rank._add_product, {"DROPS": True, "SCALES": False, "ROWS": 64, "COLUMNS": 128, "RANK": 16}, 4),
    (low_rank._add_product, {"DROPS": False, "SCALES": True, "ROWS": 64, "COLUMNS": 128, "RANK": 64}, 4),
    *(
        (
            thin_products._multiply_both,
            {"ROWS": thin_products.ROWS, "TILE_ROWS": rows, "COLUMNS": columns, "RANK": 16},
            4,
        )
        for _, rows, columns in thin_products.TILES
    ),
    (thin_products._add_partial_sums, {"BLOCK": thin_products.BLOCK, "AT_ONCE": thin_products.AT_ONCE}, 4),
    (float8._quantise_rows, {**ALONE, "ROWS": 4, "CHUNK": 16384, "WHOLE": True, "ROUNDS": False}, 16),
    (float8._quantise_rows, {"ROWS": 1, "CHUNK": 8192, "WHOLE": True, "ROUNDS": False}, 8),
    (float8._quantise_rows, {**ALONE, "ROWS": 1, "CHUNK": 8192, "WHOLE": False, "ROUNDS": False}, 8),
    (float8._unpack, {**UNPACK, "TRANSPOSED": False, "ROWS": 8, "COLUMNS": 512}, 4),
    (float8._unpack, {**UNPACK, "TRANSPOSED": True, "ROWS": float8.TILE_ROWS, "COLUMNS": float8.TILE_COLUMNS}, 4),
    (codes._unpack_straight, {**STACK, "BLOCKS": codes.BLOCKS}, codes.WARPS),
    (codes._unpack_turned, {**STACK, "ROWS": codes.TURNED_ROWS, "BLOCKS": codes.TURNED_BLOCKS}, codes.TURNED_WARPS),
    (float8_experts._multiply_codes, {**CODE_TILE, "LAST_ROWS": 64, "EMULATED": False}, 8),
    (gated_tiles._gate_tile, {"grad": None, "up_out": None, "KIND": "silu", "RANK": 64, **GATE_TILE}, 4),
    (gated_tiles._gate_tile, {"KIND": "gelu_tanh", "RANK": 16, **GATE_TILE}, 4),
    (gated_tiles._gate_tile, {"KIND": "gelu", "RANK": 64, **GATE_TILE}, 4),
    (
        ordered_rounding._round_block,
        {"STANDING": True, "BORDERS": 15, "COLUMNS": 128, "ROWS": ordered_rounding.ROWS},
        ordered_rounding.WARPS,
    ),
    (short_attention._attend, {"BLOCK": short_attention.BLOCK, "SIZE": 128}, 4),
    (short_attention._attend_backward, {"BLOCK": short_attention.BLOCK, "SIZE": 128}, 4),
    (block_attention._attend, {"CAPPED": True, "SIZE": 256, "QUERIES": 64, "KEYS": 32}, 4),
    (block_attention._of_keys, {"CAPPED": True, "SIZE": 256, "QUERIES": 32, "KEYS": 32}, 8),
    (block_attention._of_queries, {"CAPPED": True, "SIZE": 256, "QUERIES": 32, "KEYS": 32}, 8),
    (block_attention._attend, {"CAPPED": False, "SIZE": 128, "QUERIES": 64, "KEYS": 32}, 4),
    (block_attention._of_keys, {"CAPPED": False, "SIZE": 128, "QUERIES": 32, "KEYS": 64}, 4),
    (block_attention._of_queries, {"CAPPED": False, "SIZE": 64, "QUERIES": 64, "KEYS": 64}, 4),
]
FIRST = list({kernel: (kernel, *more) for kernel, *more in reversed(CASES)}.values())  # of each kernel
FIRST = [case for case in FIRST if case[0].fn.__module__ != float8.__name__]  # which the interpreter runs whole
FIRST += [
    case for case in CASES if case[0] in (gated_tiles._gate_tile, gemv_lanes.multiply_lanes, low_rank._add_product)
]
SMALLEST_SHARED = 99 * 1024  # bytes a program may have on the consumer cards from Ampere on


@pytest.mark.parametrize(
    ("kernel", "constants", "warps"), most_slow(CASES, FIRST), ids=lambda value: getattr(value, "__name__", "")
)
def test_compiles_for_hopper(kernel, constants, warps):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in NUMBERS:
            types[name] = "i32"
        else:
            types[name] = POINTERS.get(name, "*bf16")
    if kernel is gemv_lanes.multiply_lanes:
        types["packed"] = "*i64"
        if constants["KIND"] == "f16":
            types |= dict.fromkeys(("x", "b", "bias", "y"), "*fp16")
    if kernel in (
        decode_pointwise._normalise,
        decode_pointwise._centre,
        decode_pointwise._add_and_normalise,
        fused_projections._normalise_and_project,
    ):
        types["weight"] = "*bf16"
    if kernel in (
        gemv_programs.project,
        fused_projections._normalise_and_project,
        fused_projections._gate_and_project,
        decode_attention._attend_part,
    ):
        types["out"] = "*fp32"
    if kernel in (guesses._guess, guesses._accept):
        types |= {name: "*i64" for name, kind in types.items() if kind != "constexpr" and name != "width"}
    if kernel is ordered_rounding._round_block:
        types |= {name: "*fp32" for name, kind in types.items() if kind.startswith("*")} | {"places": "*i64"}
    if kernel in (float8._quantise_rows, float8._unpack):
        types |= dict.fromkeys(("scales", "side_scale", "offset"), "*fp32")
        types |= dict.fromkeys(("codes", "out"), "*fp8e4nv") | {"packed": "*u8"}
        types = {name: types[name] for name in kernel.arg_names}
    if kernel.fn.__module__ in (codes.__name__, float8_experts.__name__):
        types |= dict.fromkeys(STACK_NUMBERS, "i32") | dict.fromkeys(("offset", "stack_scale", "x_scale"), "*fp32")
        types |= {"x": "*fp8e4nv", "codes": "tensordesc<fp8e4nv[256, 128]>", "ends": "*i32", "source": "*i32"}
        types |= {"second": "*bf16", "projected": "*bf16"}
        types["out"] = "*i32" if kernel.fn.__module__ == codes.__name__ else "*bf16"
        types = {name: types[name] for name in kernel.arg_names}
    if kernel is low_rank._add_product:
        types["scale"] = "*fp32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    options = {"num_warps": warps}
    if kernel.fn.__module__ in (short_attention.__name__, block_attention.__name__):
        options["num_stages"] = 1  # as they are launched
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    if kernel is float8_experts._multiply_codes:
        assert built.metadata.shared <= 227 * 1024
        assert "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3" in built.asm["ptx"]
        return
    assert built.metadata.shared <= SMALLEST_SHARED
    if kernel in (float8._quantise_rows, float8._unpack, codes._unpack_straight, codes._unpack_turned):
        assert "cvt.rn.satfinite.e4m3x2" in built.asm["ptx"]
    if kernel is gemv_programs.multiply_few:
        assert "shfl.sync.idx" in built.asm["ptx"]
    if kernel is gemv_lanes.multiply_lanes:
        # 4 blocks of 4 products, and the adapter's; a table of 32 KiB, once.
        assert built.asm["ptx"].count("mma.sync") >= 16 * constants["TILES"] * constants["EIGHTS"]
        assert built.asm["ptx"].count("49152]") == 1


@pytest.mark.parametrize("size", [64, 200, 1536, 2048, 2560, 3072, 3584, 4096, 6144, 8192])
def test_norms_of_any_size_have_a_power_of_two_of_warps(size):
    warps = decode_pointwise._warps(size)
    assert 1 <= warps <= 8 and warps.bit_count() == 1
