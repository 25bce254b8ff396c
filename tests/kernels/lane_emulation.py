"""Runs the PTX inside gemv_lanes.py and experts/codes.py in numpy, so that Triton's interpreter can run them on a CPU.

A tensor in the former has one element a thread, and so has a register here. Shared memory starts where it starts on a card,
after a kilobyte of the system's own. Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

import ctypes
import math
import re

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

SHARED_START = 0x400
STORAGE = {tl.int32: np.int32, tl.int64: np.int64, tl.float32: np.float32}


class Shared:
    """The shared memory of one program after another."""

    def __init__(self) -> None:
        self.words = np.zeros(2**16 // 4, np.uint32)
        self.end = SHARED_START

    def allocate(self, size: int) -> int:
        """A place of so many bytes; there is one in a program, and programs come one after another."""
        self.words[:] = 0xDEADBEEF
        self.end = SHARED_START + size
        return SHARED_START

    def index(self, places, width):
        """Places of accesses of `width` bytes as word numbers."""
        assert (places % width == 0).all(), "not aligned"
        assert (places >= SHARED_START).all() and (places + width <= self.end).all(), "outside the table"
        return places // 4


class Machine:
    """Registers by name, one element a thread."""

    def __init__(self, threads: int, shared: Shared) -> None:
        self.threads, self.shared = threads, shared
        self.registers: dict[str, np.ndarray] = {}
        self.variables: dict[str, int] = {}

    def read(self, name: str) -> np.ndarray:
        """An operand: a register, a number, the lane's number or a variable's place."""
        if name == "%laneid":
            return np.arange(self.threads, dtype=np.uint32) % 32
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full(self.threads, int(name, 0), np.uint32)
        if name in self.variables:
            return np.full(self.threads, self.variables[name], np.uint32)
        return self.registers[name]

    def group(self, text: str) -> list[np.ndarray]:
        """Operands in braces."""
        return [self.read(name.strip()) for name in text.strip("{} ").split(",")]

    def place(self, text: str) -> np.ndarray:
        """An address in brackets."""
        name, _, offset = text.strip("[] ").partition("+")
        return self.read(name.strip()).astype(np.uint64) + np.uint64(int(offset or 0))

    def run(self, text: str) -> None:
        """Every instruction, one after another."""
        for line in re.sub(r"[{}]\s*\n|\n\s*}$", "\n", text).split(";"):
            words = line.strip().strip("{}").strip() if line.strip() in ("{", "}") else line.strip()
            if words:
                name, _, rest = words.partition(" ")
                self.step(name, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))

    def step(self, name: str, operands: list[str]) -> None:
        """One instruction."""
        values = self.registers
        if name == ".reg":
            return
        if name == ".shared":
            variable, size = re.fullmatch(r"(\w+)\[(\d+)\]", operands[-1]).groups()
            self.variables[variable] = self.shared.allocate(int(size))
            return
        if name in ("cp.async.commit_group", "cp.async.wait_group", "bar.warp.sync"):
            return  # copies are there at once, and lanes go together
        only = None
        if name == "@used":
            only, (name, *operands) = values["used"], operands
        target, given = operands[0], operands[1:]
        if name == "mov.b32" and given[0].startswith("{"):
            low, high = self.group(given[0])
            values[target] = low | high << np.uint32(16)
        elif name in ("mov.u32", "mov.b32"):
            values[target] = self.read(given[0])
        elif name == "mov.b64":
            low, high = (part.strip() for part in target.strip("{}").split(","))
            whole = self.read(given[0]).view(np.uint64)
            values[low], values[high] = whole.astype(np.uint32), (whole >> np.uint64(32)).astype(np.uint32)
        elif name == "setp.ne.u32":
            values[target] = self.read(given[0]) != self.read(given[1])
        elif name == "cp.async.cg.shared.global":
            to, places = self.place(target), self.place(given[0])
            assert given[1] == "16" and (places % 16 == 0).all(), "not aligned"
            for first, at in zip(self.shared.index(to, 16)[only], places[only], strict=True):
                self.shared.words[first : first + 4] = np.frombuffer(ctypes.string_at(int(at), 16), np.uint32)
        elif name == "ld.shared.b64":
            first = self.shared.index(self.place(given[0]), 8).astype(np.int64)
            values[target] = self.shared.words[first[:, None] + [0, 1]].view(np.uint64)[:, 0]
        elif name == "shl.b32":
            values[target] = self.read(given[0]) << self.read(given[1])
        elif name == "shr.u32":
            values[target] = self.read(given[0]) >> self.read(given[1])
        elif name == "or.b32":
            values[target] = self.read(given[0]) | self.read(given[1])
        elif name == "cvt.rn.satfinite.e4m3x2.f32":
            upper, lower = (_nearest_e4m3(self.read(each)) for each in given)
            values[target] = upper << np.uint32(8) | lower
        elif name == "and.b32":
            values[target] = self.read(given[0]) & self.read(given[1])
        elif name == "xor.b32":
            values[target] = self.read(given[0]) ^ self.read(given[1])
        elif name == "add.u32":
            values[target] = self.read(given[0]) + self.read(given[1])
        elif name == "mad.lo.u32":
            values[target] = self.read(given[0]) * self.read(given[1]) + self.read(given[2])
        elif name == "prmt.b32":
            both = np.stack([self.read(given[0]), self.read(given[1])], 1).astype("<u4").view(np.uint8)
            chosen = self.read(given[2])[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
            assert chosen.max() < 8, "signs are not copied here"
            values[target] = np.take_along_axis(both, chosen.astype(np.int64), 1).view("<u4")[:, 0]
        elif name == "ld.shared.b32":
            values[target] = self.shared.words[self.shared.index(self.place(given[0]), 4)]
        elif name == "st.shared.v4.b32":
            first = self.shared.index(self.place(target), 16)
            for number, value in enumerate(self.group(given[0])):
                self.shared.words[first + number] = value
        elif name in ("ld.global.nc.v4.b32", "ld.global.v4.b32"):
            places = self.place(given[0])
            assert (places % 16 == 0).all(), "not aligned"
            raw = np.stack([np.frombuffer(ctypes.string_at(int(at), 16), np.uint32) for at in places])
            for number, register in enumerate(target.strip("{}").split(",")):
                loaded = np.ascontiguousarray(raw[:, number])
                values[register.strip()] = (
                    loaded if only is None else np.where(only, loaded, self.read(register.strip()))
                )
        elif name == "shfl.sync.idx.b32":
            assert given[2:] == ["0x1c1f", "0xffffffff"]  # among four
            lanes = np.arange(self.threads)
            values[target] = self.read(given[0])[(lanes & ~3) | self.read(given[1])]
        elif name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32":
            self.multiply(target, *(self.group(operand) for operand in given))
        else:
            raise NotImplementedError(name)

    def multiply(self, target: str, a: list, b: list, c: list) -> None:
        """One mma of every warp."""
        lane = np.arange(32)
        group, member = lane // 4, lane % 4
        result = [np.zeros(self.threads, np.float32) for _ in range(4)]
        for warp in range(0, self.threads, 32):
            part = slice(warp, warp + 32)
            left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
            for number, register in enumerate(a):
                pair = register[part].view(np.float16).reshape(32, 2)
                for i in range(2):
                    left[group + 8 * (number % 2), 2 * member + 8 * (number // 2) + i] = pair[:, i]
            for number, register in enumerate(b):
                pair = register[part].view(np.float16).reshape(32, 2)
                for i in range(2):
                    right[2 * member + 8 * number + i, group] = pair[:, i]
            product = left @ right
            for number in range(4):
                found = product[group + 8 * (number // 2), 2 * member + number % 2]
                result[number][part] = found + c[number][part]
        for register, value in zip(target.strip("{}").split(","), result, strict=True):
            self.registers[register.strip()] = value


def _nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Codes of fp32 values of no more than 448."""
    return torch.tensor(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)


def emulate(monkeypatch):
    """Lets products on the CPU take the lanes, and their PTX run here."""
    from qlora_cli.kernels.decode import gemv

    shared = Shared()

    def run_ptx(text, constraints, given, dtype, is_pure, pack):
        assert pack == 1
        text = getattr(text, "value", text)  # of a constexpr
        kinds = dtype if isinstance(dtype, tuple) else (dtype,)
        assert constraints.count("=") == len(kinds)
        arrays = [value.handle.data for value in given]
        whole = np.broadcast_shapes(*(array.shape for array in arrays))
        threads = math.prod(whole)
        machine = Machine(threads, shared)
        for number, array in enumerate(arrays, len(kinds)):
            wide = np.ascontiguousarray(np.broadcast_to(array, whole)).reshape(threads)
            wide = wide if wide.dtype == np.float32 or wide.itemsize == 8 else wide.astype(np.int32).view(np.uint32)
            machine.registers[f"${number}"] = wide
        machine.run(text)
        scalar = all(value.shape == [] for value in given)
        made = []
        for number, kind in enumerate(kinds):
            value = np.ascontiguousarray(
                machine.registers[f"${number}"].astype(np.uint32, copy=False)
                if kind is tl.int32
                else machine.registers[f"${number}"]
            )
            data = value.view(STORAGE[kind])
            data = data[:1] if scalar else data.reshape(whole)
            type_ = kind if scalar else tl.core.block_type(kind, list(whole))
            made.append(tl.core.tensor(TensorHandle(data, kind), type_))
        return tuple(made) if isinstance(dtype, tuple) else made[0]

    monkeypatch.setattr(tl, "inline_asm_elementwise", run_ptx)
    monkeypatch.setattr(gemv, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(gemv, "overlaps", lambda device: False)
