"""Plan of a merged checkpoint: for each of its files the header, and the tasks that compute its tensors."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.adapters.merged_experts import MergedExperts
from qlora_cli.core.device import dtype_name
from qlora_cli.core.merge.arithmetic import ROWS_ELEMENTS, RowsOf, merge_rows, restored_rows, restores_by_rows
from qlora_cli.core.merge.base import UNMERGED, find_rearranged, main_dtype
from qlora_cli.core.merge.delta import WeightDelta
from qlora_cli.core.merge.weight_tying import settle_tying
from qlora_cli.core.models.account import plan_packing
from qlora_cli.core.models.quantization import QUANT_STATE_BYTES, pack_weight, packed_tensors
from qlora_cli.core.models.weight_names import WeightOrigin
from qlora_cli.core.storage.safetensors_file import HeldTensor, TensorFile, TensorSpec, make_header
from qlora_cli.core.storage.safetensors_header import Header, TensorEntry
from qlora_cli.core.weights.stored_formats import StoredFormat
from qlora_cli.errors import MergeError
from qlora_cli.settings.groups import QuantizationSettings

COPY_BYTES = 4 * 2**20  # moved at a time where nothing is computed
GPU_ROWS_ELEMENTS = 2**24  # worked on at a time on a GPU: launches cost more than memory there

TensorChunk = tuple[str, torch.Tensor]  # name of an output tensor, and its next bytes


@dataclass(frozen=True)
class MergeTask:
    """Work that makes one or more whole tensors of a file, chunk after chunk, each tensor's chunks in order."""

    held_bytes: int  # host memory while it runs
    run: Callable[[], Iterator[TensorChunk]]


@dataclass(frozen=True)
class OutputFile:
    """One file of the merged checkpoint."""

    name: str
    header: Header
    tasks: tuple[MergeTask, ...]


@dataclass(frozen=True)
class MergePlan:
    """All files of the merged checkpoint, and what of the configuration they change."""

    files: tuple[OutputFile, ...]
    vocabulary: int | None  # new number of embedding rows, None where it stays
    untied: bool  # the head no longer equals the input embeddings
    restored: int  # weights sent through the 4-bit round trip
    changed: int  # weights and biases the adapter changes

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.header.total_bytes for file in self.files)


@dataclass(frozen=True)
class MergeOptions:
    """How weights are merged."""

    restore: bool  # whether quantised weights are sent through the 4-bit round trip first
    quantization: QuantizationSettings  # of the base in training
    compute_dtype: torch.dtype  # the base was quantised from
    dtype: torch.dtype  # of the merged weights
    pack: bool  # whether linear layers are written in 4 bits
    device: torch.device  # where weights are worked on


@dataclass
class MergePlanner:
    """Plans a merged checkpoint: same files and order of tensors as the base."""

    files: Sequence[TensorFile]  # of the base
    names: dict[str, str]  # name in the model → name in the checkpoint (`weight_names.map_names`)
    model: PreTrainedModel  # the base's architecture on the meta device
    deltas: Mapping[str, WeightDelta]  # by name in the model (`delta.read_deltas`)
    adapter: TensorFile
    options: MergeOptions
    stored: StoredFormat | None = None  # how the base is stored, if not plain
    new_biases: Collection[str] = ()  # that the base lacks, by name in the model
    skipped: Sequence[str] = ()  # modules that were in 16 bits in training (`Base.skipped`)

    def __post_init__(self) -> None:
        packed = plan_packing(self.model, self.skipped).packed
        self.linears = {name for name in packed if name.endswith(".weight")}
        self.experts = MergedExperts(self.files, self.model, packed - self.linears)
        self.main_dtype = main_dtype(self.files)
        # Stored tensors of which weights that are merged are made by rows: from where, and `WeightOrigin.rows`.
        self.rearranged: dict[str, tuple[WeightOrigin, dict[str, torch.Tensor]]] = {}
        if self.options.pack and self.experts.stacks:
            raise MergeError(
                "transformers loads no 4-bit checkpoint of this model: it keeps its experts as stacks in 16 bits.",
                "Leave --quantize out; qlora generate --adapter answers in 4 bits, beside the base.",
            )

    def plan(self, *, keep_tied: bool) -> MergePlan:
        """The plan; with `keep_tied` the delta of tied input embeddings is the head's too.

        Raises:
            MergeError: A weight that is quantised or adapted is not in the checkpoint, or has another shape there.
            AdapterError: The adapter's vocabulary is not one.
        """
        tying = settle_tying(self.model, self.names, self.deltas, self.adapter, self.files, keep_tied=keep_tied)
        parameter_of = {name: parameter for parameter, name in self.names.items()}
        self.names = {**self.names, **tying.borrowed}
        self.deltas = tying.deltas
        stacks = {n: w.experts for n, w in self.experts.stacks.items() if self.options.restore or n in self._merged}
        self.rearranged = find_rearranged(
            self._merged - set(self.names) - set(self.experts.stacks),
            stacks,
            {name: entry.shape for file in self.files for name, entry in file.entries.items()},
            self.model,
            by_rows=not self.options.pack and not (self.stored is not None and self.stored.is_four_bit),
            way="leave --quantize out" if self.options.pack else UNMERGED,
        )
        self._check_shapes()
        # Parameter → its layer's weight in the checkpoint, and what it is called there.
        weights = {bias: self.names[bias.removesuffix("bias") + "weight"] for bias in sorted(self.new_biases)}
        new_biases = {bias: (weight, weight.removesuffix("weight") + "bias") for bias, weight in weights.items()}
        outputs, restored = [], 0
        for file in self.files:
            wanted = [(name, parameter_of.get(name, "")) for name in file.entries]
            wanted += [(new, new) for new, source in tying.borrowed.items() if source in file.entries]
            wanted += [(bias, name) for name, (weight, bias) in new_biases.items() if weight in file.entries]
            tensors: list[TensorSpec] = []
            tasks: list[MergeTask] = []
            for output_name, parameter in wanted:
                if parameter in self.new_biases:
                    spec, made_anew = self._plan_new_bias(output_name, parameter)
                    tensors.append(spec)
                    tasks.append(made_anew)
                    continue
                if (task := self._plan_experts(output_name)) is not None:
                    tensors.append((output_name, self.options.dtype, file.entries[output_name].shape))
                    tasks.append(task)
                    restored += self.options.restore
                    continue
                if output_name in self.rearranged:
                    spec, rearranged, weights_restored = self._plan_rearranged(output_name)
                    tensors.append(spec)
                    tasks.append(rearranged)
                    restored += weights_restored
                    continue
                source = file.entries[self.names[parameter] if parameter else output_name]
                made, task = self._plan_tensor(file, source, output_name, parameter)
                tensors += made
                tasks.append(task)
                restored += self.options.restore and parameter in self.linears
            outputs.append(OutputFile(file.path.name, make_header(tensors, file.header.metadata), tuple(tasks)))
        return MergePlan(tuple(outputs), tying.vocabulary, tying.untied, restored, len(self.deltas))

    @property
    def _merged(self) -> set[str]:
        """Parameters of the base that are not copied as they are stored."""
        changed = set(self.deltas) | (self.linears if self.options.restore or self.options.pack else set())
        return changed - set(self.new_biases)

    def _check_shapes(self) -> None:
        made_otherwise = {target for _, rows in self.rearranged.values() for target in rows} | set(self.experts.stacks)
        stored = {name: entry for file in self.files for name, entry in file.entries.items()}
        state = self.model.state_dict()
        for name in sorted(self._merged - made_otherwise):
            found, shape = stored[self.names[name]], tuple(state[name].shape)
            if found.shape != shape:
                raise MergeError(
                    f"{found.name} is {found.shape} in the base checkpoint where its config.json makes it {shape}.",
                    "Give the base the adapter was trained on with --model.",
                )

    def _plan_tensor(
        self, file: TensorFile, source: TensorEntry, output_name: str, parameter: str
    ) -> tuple[list[TensorSpec], MergeTask]:
        """The output tensors made from one tensor of the base, and the work; `parameter` is "" for none of the model."""
        delta = self.deltas.get(parameter, WeightDelta())
        linear, options = parameter in self.linears, self.options
        converted = linear or parameter in self.deltas or source.dtype == self.main_dtype
        dtype = options.dtype if converted and source.dtype.is_floating_point else source.dtype
        if delta.replacement:
            file, source = self.adapter, self.adapter.entries[delta.replacement]
        restore, pack = linear and options.restore and not delta.replacement, linear and options.pack
        restore = restore and not self._is_four_bit(file, source.name)
        shape = source.shape
        if not (restore or pack or delta.a or delta.added or delta.rows):
            copied = MergeTask(16 * COPY_BYTES, lambda: self._copy(file, source, output_name, dtype))
            return [(output_name, dtype, shape)], copied
        if delta.added:
            task = MergeTask(16 * source.total_bytes, lambda: self._merge_bias(file, source, output_name, delta, dtype))
            return [(output_name, dtype, shape)], task
        transposed = linear and isinstance(self.model.get_submodule(parameter.rpartition(".")[0]), Conv1D)

        def blocks() -> Iterator[torch.Tensor]:
            return self._merge_weight(file, source, delta, dtype, restore=restore, transposed=transposed)

        def run() -> Iterator[TensorChunk]:
            chunks = [torch.cat(list(blocks())).T] if transposed else blocks()
            return ((output_name, chunk) for chunk in chunks)

        buffers = 32 * ROWS_ELEMENTS
        if pack:
            parts = packed_tensors(shape[::-1] if transposed else shape, options.quantization)
            made = [(output_name + end, kind, size) for end, kind, size in parts]
            held = prod(shape) * (source.dtype.itemsize * (1 + transposed) + 2 * dtype.itemsize + 1)
            return made, MergeTask(held + buffers, lambda: self._pack(blocks(), output_name))
        # Most weights are read row by row; only what bitsandbytes itself restores, and a transpose, need all of it.
        whole = transposed or (restore and not restores_by_rows(options.quantization, shape[1], options.device))
        held = prod(shape) * (2 * source.dtype.itemsize + 8) if whole else 0
        return [(output_name, dtype, shape)], MergeTask(held + buffers, run)

    def _plan_rearranged(self, name: str) -> tuple[TensorSpec, MergeTask, int]:
        """A stored tensor whose rows are those of several weights, or some of one's; the work, and how many weights are
        restored, counted with the first of what they are stored in."""
        origin, rows_of = self.rearranged[name]
        home = {stored: file for file in self.files for stored in file.entries}
        counts = [home[stored].entries[stored].shape[0] for stored in origin.names]
        first = sum(counts[: origin.names.index(name)])
        shape, dtype = home[name].entries[name].shape, self.options.dtype
        names = {target for target in rows_of if target in self._merged}

        def run() -> Iterator[TensorChunk]:
            stored = torch.cat([home[source].read(source) for source in origin.names])
            merged = stored.to(dtype)
            for target in sorted(names):
                held = HeldTensor(target, stored[rows_of[target]])
                (made,), task = self._plan_tensor(held, held.entries[target], target, target)
                parts = [chunk.contiguous().flatten().view(torch.uint8) for _, chunk in task.run()]
                merged[rows_of[target]] = torch.cat(parts).view(made[1]).view(tuple(made[2]))
            yield name, merged[first : first + shape[0]]

        held_bytes = sum(counts) * prod(shape[1:]) * (2 * self.main_dtype.itemsize + dtype.itemsize + 8)
        restored = len(names & self.linears) if self.options.restore and not first else 0
        return (name, dtype, shape), MergeTask(held_bytes + 32 * ROWS_ELEMENTS, run), restored

    def _plan_experts(self, source: str) -> MergeTask | None:
        """The work on one tensor of a stack of experts; None for any other, and where nothing changes."""
        experts, options = self.experts, self.options
        place = experts.places.get(source)
        if place is None:
            return None
        four_bit = self._is_four_bit(experts.file_of[source], source)
        restore = options.quantization if options.restore and not four_bit else None
        delta = self.deltas.get(place[0])
        if restore is None and delta is None:
            return None
        pairs = {place[0]: delta.experts} if delta is not None and delta.experts is not None else {}

        def run() -> Iterator[TensorChunk]:
            merged = experts.merged(source, pairs, self.adapter, restore, options.compute_dtype, options.device)
            return ((source, _rounded(values, options.dtype, source).cpu()) for values in merged)

        return MergeTask(experts.held_bytes(source), run)

    def _is_four_bit(self, file: TensorFile, name: str) -> bool:
        """Whether a weight's values in the checkpoint are those it was trained against, of the same 4 bits."""
        return self.stored is not None and self.stored.is_four_bit and not file.is_plain(name)

    def _copy(self, file: TensorFile, source: TensorEntry, name: str, dtype: torch.dtype) -> Iterator[TensorChunk]:
        if not file.is_plain(source.name):
            once = self._is_four_bit(file, source.name)  # decoded as a whole
            step = source.shape[0] if once else max(1, ROWS_ELEMENTS // max(1, prod(source.shape[1:])))
            for first in range(0, source.shape[0], step):
                values = file.read(source.name, slice(first, min(first + step, source.shape[0])))
                yield name, _rounded(values, dtype, source.name).cpu()
            return
        for start in range(0, source.total_bytes, COPY_BYTES):
            buffer = torch.empty(min(COPY_BYTES, source.total_bytes - start), dtype=torch.uint8)
            file.read_into(buffer, source.start + start)
            if dtype != source.dtype:
                buffer = _rounded(buffer.view(source.dtype), dtype, source.name)
            yield name, buffer

    def _plan_new_bias(self, name: str, parameter: str) -> tuple[TensorSpec, MergeTask]:
        """A bias that the base lacks: what the adapter adds to its layer, or zeros."""
        shape, dtype = tuple(self.model.get_parameter(parameter).shape), self.options.dtype
        delta = self.deltas.get(parameter, WeightDelta())

        def run() -> Iterator[TensorChunk]:
            added = self.adapter.read(delta.added).float() if delta.added else torch.zeros(shape)
            yield name, _rounded(delta.scaling * added, dtype, name)

        return (name, dtype, shape), MergeTask(16 * prod(shape), run)

    def _merge_bias(
        self, file: TensorFile, source: TensorEntry, name: str, delta: WeightDelta, dtype: torch.dtype
    ) -> Iterator[TensorChunk]:
        assert delta.added
        added = self.adapter.read(delta.added).float()
        yield name, _rounded(file.read(source.name).float() + delta.scaling * added, dtype, name)

    def _merge_weight(
        self,
        file: TensorFile,
        source: TensorEntry,
        delta: WeightDelta,
        dtype: torch.dtype,
        *,
        restore: bool,
        transposed: bool,
    ) -> Iterator[torch.Tensor]:
        """Blocks of rows of the merged weight, (out, in) also where the checkpoint holds it transposed."""
        options = self.options
        rows, columns = source.shape[::-1] if transposed else source.shape
        whole = (
            file.read(source.name).to(options.device) if transposed or self._is_four_bit(file, source.name) else None
        )
        whole = whole.T.contiguous() if whole is not None and transposed else whole

        def read_rows(start: int, stop: int) -> torch.Tensor:
            if whole is not None:
                return whole[start:stop]
            return file.read(source.name, slice(start, stop)).to(options.device)

        def stored_rows(start: int, stop: int) -> torch.Tensor:
            return read_rows(start, stop).to(torch.float32, copy=True)

        rows_of: RowsOf = stored_rows
        if restore:
            rows_of = restored_rows(
                read_rows,
                (rows, columns),
                name=source.name,
                quantization=options.quantization,
                compute_dtype=options.compute_dtype,
            )
        step = max(1, (ROWS_ELEMENTS if options.device.type == "cpu" else GPU_ROWS_ELEMENTS) // columns)
        used = [name for name in (delta.a, delta.b, delta.magnitude, delta.rows) if name]
        tensors = {name: self.adapter.read(name).to(options.device).float() for name in used}
        for part in merge_rows(rows_of, delta, tensors, rows=rows, step=step):
            yield _rounded(part, dtype, source.name).cpu()

    def _pack(self, blocks: Iterator[torch.Tensor], name: str) -> Iterator[TensorChunk]:
        options = self.options
        weight = torch.cat(list(blocks)).to(options.device)
        packed = pack_weight(
            weight, quant_type=options.quantization.quant_type, double_quant=options.quantization.double_quant
        )
        for ending, value in packed.items():
            content = value.cpu()
            if "quant_state" in ending:  # JSON, which may end in spaces
                content = torch.nn.functional.pad(content, (0, QUANT_STATE_BYTES - len(content)), value=ord(" "))
            yield name + ending, content


def _rounded(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Rounds once, to nearest even.

    Raises:
        MergeError: A result is not finite.
    """
    result = values.to(dtype)
    # A sum is NaN or infinite when a term is, and 10 times cheaper than a test of every term.
    checked = [values, result] if dtype == torch.float16 else [values]
    if not all(bool(torch.isfinite(v.sum(dtype=torch.float32))) for v in checked) and not bool(
        torch.isfinite(result).all()
    ):
        if bool(torch.isfinite(values).all()):
            raise MergeError(f"{name} has values too large for {dtype_name(dtype)}.", "Add --dtype bfloat16.")
        raise MergeError(f"{name} holds NaN or infinity in the base.", "Download the base again.")
    return result
