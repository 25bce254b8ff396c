"""What the instructions of gemv_lanes.py do, in numpy, so that Triton's interpreter can run its program on a CPU.

A tensor there has one element a thread. Fragments are those of the PTX ISA, section "Matrix Fragments for mma.m16n8k16".
"""

import numpy as np
import triton.language as tl

from qlora_cli.kernels import gemv_lanes

TABLE: dict[int, int] = {}  # entry → pair


def _wrap(data, like, dtype):
    from triton.runtime.interpreter import TensorHandle

    return tl.core.tensor(TensorHandle(data, dtype), tl.core.block_type(dtype, list(data.shape)))


def _array(tensor):
    return tensor.handle.data


def make_table(seed):
    """Place 0; the table itself is `TABLE`."""
    TABLE.clear()
    return seed * 0


def store_pair(table, entry, pair):
    """Keeps the entries."""
    assert (_array(table) == 0).all()
    TABLE.update(zip(_array(entry).tolist(), _array(pair).tolist(), strict=True))
    return entry


def own_bank(table):
    """No banks here."""
    return table


def expand(words, bank):
    """8 pairs a lane, lowest byte first."""
    data = _array(words).astype(np.uint64)
    look = np.vectorize(TABLE.__getitem__)
    pairs = [look((data >> np.uint64(8 * i)) & np.uint64(255)).astype(np.int32) for i in range(8)]
    return tuple(_wrap(pair, words, tl.int32) for pair in pairs)


def load_activations(pointer):
    """16 values a lane from its address, as 8 pairs."""
    import ctypes

    addresses = _array(pointer).astype(np.int64)
    assert (addresses % 16 == 0).all(), "loads of 16 bytes at another address"
    raw = np.stack([np.frombuffer(ctypes.string_at(int(a), 32), dtype=np.int32) for a in addresses])
    return tuple(_wrap(np.ascontiguousarray(raw[:, i]), pointer, tl.int32) for i in range(8))


def _halves(registers):
    """(threads,) pairs to (threads, 2) values of float16."""
    return _array(registers).view(np.float16).reshape(-1, 2).astype(np.float32)


def _mma(a, b):
    """One m16n8k16: 4 and 2 registers of every lane of a warp to 4."""
    left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for number, registers in enumerate(a):
            row, column = group + 8 * (number % 2), 2 * member + 8 * (number // 2)
            left[row, column : column + 2] = registers[lane]
        for number, registers in enumerate(b):
            at = 2 * member + 8 * number
            right[at : at + 2, group] = registers[lane]
    product = left @ right
    rows = np.arange(32) // 4
    columns = 2 * (np.arange(32) % 4)
    return [
        product[rows, columns],
        product[rows, columns + 1],
        product[rows + 8, columns],
        product[rows + 8, columns + 1],
    ]


def multiply_block(a, b, x, kind):
    """Four m16n8k16 one after another, warp by warp."""
    assert str(getattr(kind, "value", kind)) == "f16"
    low, high, right = ([_halves(r) for r in registers] for registers in (a, b, x))
    threads = low[0].shape[0]
    total = np.zeros((4, threads), np.float32)
    for warp in range(0, threads, 32):
        lanes = slice(warp, warp + 32)
        for i in range(0, 8, 2):
            left = [low[i][lanes], high[i][lanes], low[i + 1][lanes], high[i + 1][lanes]]
            total[:, lanes] += _mma(left, [right[i][lanes], right[i + 1][lanes]])
    return tuple(_wrap(total[i], a[0], tl.float32) for i in range(4))


def of_quarter(value, number):
    """What a shuffle among four lanes gives."""
    data, numbers = _array(value), _array(number)
    lanes = np.arange(data.shape[0])
    return _wrap(data[(lanes & ~3) | numbers], value, tl.float32)


def emulate(monkeypatch):
    """Puts the functions above in the place of the instructions, and lets products on the CPU take them."""
    from qlora_cli.kernels import gemv

    for name in (
        "make_table",
        "store_pair",
        "own_bank",
        "expand",
        "load_activations",
        "multiply_block",
        "of_quarter",
    ):
        monkeypatch.setattr(gemv_lanes, f"_{name}", globals()[name])
    monkeypatch.setattr(gemv, "_multiprocessors", lambda device: 2)
