"""How fast `prepare` is beside the tokenizer alone, and how much memory it takes: a JSONL made by repeating rows in, two figures out.

    python benchmarks/data_throughput.py --data gsm8k_train.jsonl --tokenizer tokenizer.json --gigabytes 5

The first figure is rows/s of the whole preparation (reading, checking, formatting, tokenising, writing) over rows/s of
the fast tokenizer's `encode_batch` on the same formatted rows, both on all cores. The second is the highest memory of
the process and its children together, in resident bytes.

    python benchmarks/data_throughput.py --data gsm8k_train.jsonl --tokenizer tokenizer.json --chats 6000

With --chats it is processor time instead, of this process and the one that renders chat templates: `encode_batch` over
reading conversations, rendering, checking and tokenising them, the two measured in turn so that a busy machine slows both.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import prepare_rows
from qlora_cli.core.prompts.chat_template import FALLBACK_TEMPLATE
from qlora_cli.core.prompts.encoder import TextEncoder, encoder_of
from qlora_cli.core.prompts.formatting import RowFormatter, chat_formatting

TEMPLATE = "### Question:\n{question}\n\n### Answer:\n{answer}"


class PeakMemory:
    """Samples the resident memory of this process and its children; shared pages count once for each."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = self.start_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.2):
            total = 0
            for member in [process, *process.children(recursive=True)]:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.start_bytes = self.start_bytes or total
            self.peak_bytes = max(self.peak_bytes, total)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def repeat_rows(source: Path, target: Path, total_bytes: int) -> int:
    """Writes the lines of `source` again and again, each numbered so that no two are alike; returns how many."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = 0
    with target.open("w", encoding="utf-8") as stream:
        while stream.tell() < total_bytes:
            for line in lines:
                stream.write(json.dumps({"question": f"{rows}. {line['question']}", "answer": line["answer"]}) + "\n")
                rows += 1
    return rows


def tokenizer_alone(tokenizer_file: Path, source: Path, seconds: float) -> tuple[float, float]:
    """Rows/s of encode_batch on formatted rows held in memory, and CPU seconds a row."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    with source.open(encoding="utf-8") as stream:
        texts = [TEMPLATE.format(**json.loads(line)) for line, _ in zip(stream, range(20_000), strict=False)]
    tokenizer.encode_batch(texts[:1000], add_special_tokens=False)
    start, cpu_start, rows = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        tokenizer.encode_batch(texts, add_special_tokens=False)
        rows += len(texts)
    return rows / (time.perf_counter() - start), (time.process_time() - cpu_start) / rows


def in_child(work: Callable[..., tuple[float, float]], *arguments: object) -> tuple[float, float]:
    """Runs in a process of its own, so that its memory is not counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def living_cpu_seconds() -> float:
    """Of this process and of its children that live."""
    process = psutil.Process()
    return sum(sum(member.cpu_times()[:2]) for member in [process, *process.children(recursive=True)])


def measure_chats(tokenizer_file: Path, source: Path, count: int, repeats: int = 5) -> dict[str, float]:
    """Processor time of conversations to token ids, and of `encode_batch` on the same text: microseconds a row."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    spec = encoder_of(tokenizer).spec
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    pairs = [(f"{i}. {lines[i % len(lines)]['question']}", lines[i % len(lines)]["answer"]) for i in range(count)]
    talks = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs
    ]
    texts = [f"### User:\n{asked}\n\n### Assistant:\n{said}" for asked, said in pairs]
    whole: list[float] = []
    alone: list[float] = []
    for _ in range(repeats):
        encoder = TextEncoder(spec)  # a new one, which has met no word yet
        formatter = RowFormatter(chat_formatting(FALLBACK_TEMPLATE), encoder)
        formatter.format_records(talks[:1], "completion")
        start = living_cpu_seconds()
        for first in range(0, count, 500):
            formatted = formatter.format_records(talks[first : first + 500], "completion")
            encoder.encode_rows([row for rows in formatted for row in rows])  # type: ignore[union-attr]
        middle = living_cpu_seconds()
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        whole.append((middle - start) / count * 1e6)
        alone.append((living_cpu_seconds() - middle) / count * 1e6)
    ratios = [b / a for a, b in zip(whole, alone, strict=True)]
    return {
        "chats": count,
        "chat_cpu_microseconds_a_row": round(statistics.median(whole)),
        "encode_batch_cpu_microseconds_a_row": round(statistics.median(alone)),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """Runs both measurements and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of encode_batch alone, before and after")
    parser.add_argument("--chats", type=int, help="measure so many conversations instead, in processor time")
    arguments = parser.parse_args()
    if arguments.chats:
        print(json.dumps(measure_chats(arguments.tokenizer, arguments.data, arguments.chats), indent=2))
        return
    directory = Path(tempfile.mkdtemp(prefix="qlora-bench-"))
    try:
        data = directory / "rows.jsonl"
        rows = repeat_rows(arguments.data, data, int(arguments.gigabytes * 1e9))
        before = in_child(tokenizer_alone, arguments.tokenizer, data, arguments.seconds)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer), eos_token="<|endoftext|>")
        config = PrepareConfig(data=str(data), template=TEMPLATE)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        with PeakMemory() as memory:
            summary = prepare_rows(config, tokenizer, None, directory / "prepared", lambda event: None)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
        assert len(PreparedRows(summary.directory)) == rows == summary.manifest["rows"]
        after = in_child(tokenizer_alone, arguments.tokenizer, data, arguments.seconds)
    finally:
        shutil.rmtree(directory)
    # The machine may have been busier at one time than at the other.
    alone, cpu_alone = ((first + second) / 2 for first, second in zip(before, after, strict=True))
    print(
        json.dumps(
            {
                "rows": rows,
                "bytes": int(arguments.gigabytes * 1e9),
                "seconds": round(seconds, 1),
                "rows_per_second": round(rows / seconds),
                "encode_batch_rows_per_second": [round(before[0]), round(after[0])],
                "ratio": round(rows / seconds / alone, 3),
                "cpu_microseconds_a_row": round(cpu / rows * 1e6),
                "encode_batch_cpu_microseconds_a_row": round(cpu_alone * 1e6),
                "peak_resident_bytes": memory.peak_bytes,
                "start_resident_bytes": memory.start_bytes,
                "cores": len(os.sched_getaffinity(0)),
                "cpu": platform.processor() or platform.machine(),
                "tokenizers": tokenizers.__version__,
                "python": platform.python_version(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
