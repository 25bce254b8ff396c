"""Reading data files: every format gives the same records, every bad row its file, line and cause."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.reading.arrow_reader import read_parquet
from qlora_cli.core.reading.chunks import BadRow, parse_chunk
from qlora_cli.core.reading.readers import CHUNK_BYTES, kind_of, read_chunks

LIMIT = 2**20
PROJECT = Path(__file__).resolve().parents[2]
ROWS = [{"a": "one é", "b": 'two "quoted", 東京'}, {"a": "line\nend", "b": "ünder🙂"}, {"a": "", "b": "x"}]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def read(path, limit=LIMIT, chunk_bytes=CHUNK_BYTES):
    """([(line, record)], [bad row as text])."""
    records, bad = [], []
    for chunk in read_chunks(path, path.name, limit, chunk_bytes):
        parse_chunk(chunk, limit)
        assert len(chunk.records) == len(chunk.lines)
        records += zip(chunk.lines, chunk.records, strict=True)
        bad += map(str, chunk.bad_rows)
    return records, bad


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
}
CUT_SHORT = {
    ".gz": "Compressed file ended before the end-of-stream marker was reached",
    ".zst": "Truncated compressed stream",
    ".bz2": "Compressed file ended before the end-of-stream marker was reached",
    ".xz": "Compressed file ended before the end-of-stream marker was reached",
}


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    if compress := COMPRESS.get(path.suffix):
        content = compress(content[:50]) + compress(content[50:])  # two members, as `cat` makes them
    path.write_bytes(content)
    return path


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, delimiter=","):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


FORMATS = {
    "rows.jsonl": as_jsonl(ROWS),
    "rows.ndjson": "\ufeff\n" + as_jsonl(ROWS) + "\n",
    "rows.jsonl.gz": as_jsonl(ROWS),
    "rows.jsonl.zst": as_jsonl(ROWS),
    "rows.jsonl.bz2": as_jsonl(ROWS),
    "rows.csv.xz": as_csv(ROWS),
    "windows.jsonl": as_jsonl(ROWS).replace("\n", "\r\n"),
    "unended.jsonl": as_jsonl(ROWS).rstrip(),
    "array.jsonl": json.dumps(ROWS),
    "lines.json": as_jsonl(ROWS),
    "array.json": json.dumps(ROWS, ensure_ascii=False),
    "indented.json": "\ufeff \n" + json.dumps(ROWS, indent=2),
    "array.json.gz": json.dumps(ROWS),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "questions.json": json.dumps({"questions": ROWS}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "rows.csv": as_csv(ROWS),
    "rows.csv.zst": "\ufeff" + as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "rows.tsv": as_csv(ROWS, "\t"),
    "ROWS.JSONL": as_jsonl(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    records, bad = read(write(tmp_path / name, FORMATS[name]))
    assert not bad
    assert [record for _, record in records] == ROWS


def test_parquet_gives_the_same_records(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS * 700), tmp_path / "rows.parquet", row_group_size=900)
    records, bad = read(tmp_path / "rows.parquet")
    assert not bad
    assert records == list(enumerate(ROWS * 700, start=1))


def test_text_files_hold_a_row_a_line(tmp_path):
    path = write(tmp_path / "book.txt.gz", "first\r\n\n  second é\u2028still second\nthird")
    assert read(path)[0] == [
        (1, {"text": "first"}),
        (3, {"text": "  second é\u2028still second"}),
        (4, {"text": "third"}),
    ]


def test_one_json_object_may_be_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read(write(tmp_path / "a.json", json.dumps(row)))[0] == [(1, row)]
    assert read(write(tmp_path / "b.json", json.dumps({"text": "a"}, indent=1)))[0] == [(1, {"text": "a"})]
    assert read(write(tmp_path / "c.json", json.dumps({"input_ids": [1, 2]})))[0] == [(1, {"input_ids": [1, 2]})]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 2**19])
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"a": TEXTS, "n": st.lists(st.integers() | TEXTS | st.none(), max_size=3)})))
def test_rows_survive_any_cutting_into_chunks(tmp_path_factory, chunk_bytes, rows):
    directory = tmp_path_factory.mktemp("chunks")
    rows = rows or [{"a": "b", "n": []}]
    lines, bad = read(write(directory / "rows.jsonl", as_jsonl(rows)), chunk_bytes=chunk_bytes)
    assert not bad
    assert lines == list(enumerate(rows, start=1))
    for ascii_only, indent in ((True, None), (False, 1)):
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
        records, bad = read(write(directory / "array.json", text), chunk_bytes=chunk_bytes)
        assert not bad
        assert [record for _, record in records] == rows
        if indent:
            opening = [i for i, line in enumerate(text.split("\n"), 1) if line == " {"]
            assert [line for line, _ in records] == opening


GOOD = b'{"a": "1"}\n'
BAD_LINES = {
    "invalid": (b'{"a": 1,, "b": 2}', "invalid JSON at column 9: Expecting property name enclosed in double quotes"),
    "truncated": (b'{"a": "hel', "truncated JSON: the line ends at column 10 inside a value"),
    "truncated after a comma": (b'{"a": 1,', "truncated JSON: the line ends at column 8 inside a value"),
    "two objects": (b'{"a": 1} {"a": 2}', "invalid JSON at column 10: Extra data"),
    "not UTF-8": (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xE9 at byte 11 of the line"),
    "NUL": (b'{"a": "x\x00y"}', "holds a NUL character at column 9"),
    "escaped NUL": (b'{"a": ["x\\u0000y"]}', "field 'a' holds a NUL character"),
    "half a pair in a key": (b'{"a": {"\\ud83d": 1}}', r"field 'a' holds half a surrogate pair (\ud83d)"),
    "half a pair": (b'{"a": "\\ud83d"}', r"field 'a' holds half a surrogate pair (\ud83d)"),
    "NaN": (b'{"a": NaN}', "holds NaN, which is no JSON value"),
    "Infinity": (b'{"a": [1, -Infinity]}', "holds -Infinity, which is no JSON value"),
    "no object": (b'["a"]', "a row must be an object with named fields, but this is a list"),
    "only a number": (b"7", "a row must be an object with named fields, but this is a number"),
    "null": (b"null", "a row must be an object with named fields, but this is null"),
    "too long": (b'{"a": "' + b"x" * 200 + b'"}', "longer than --max-line-bytes 100"),
    "too deep": (b'{"a": ' + b"[" * 100_000, "longer than --max-line-bytes 100"),
}


@pytest.mark.parametrize("chunk_bytes", [5, 2**19])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_the_rows_around_it_are_read(tmp_path, kind, chunk_bytes):
    bad_line, cause = BAD_LINES[kind]
    path = write(tmp_path / "rows.jsonl", GOOD * 3 + bad_line + b"\n" + GOOD)
    records, bad = read(path, limit=100, chunk_bytes=chunk_bytes)
    assert bad == [f"rows.jsonl:4: {cause}"]
    assert [line for line, _ in records] == [1, 2, 3, 5]


def test_json_nested_too_deeply_is_a_bad_row_and_not_a_crash(tmp_path):
    nested = b'{"a": ' + b"[" * 100_000
    assert read(write(tmp_path / "rows.jsonl", nested))[1] == ["rows.jsonl:1: JSON nested too deeply"]
    (bad,) = read(write(tmp_path / "rows.json", b"[" + nested))[1]
    assert bad.startswith("rows.json:1: JSON nested too deeply")


def test_half_a_pair_is_fine_beside_its_other_half(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"a": "\\ud83d\\ude42 \\u00e9"}')
    assert read(path) == ([(1, {"a": "🙂 é"})], [])


BAD_ARRAYS = {
    "truncated in a row": (b'[\n{"a": "1"},\n{"a": "x', 3, "truncated JSON: the file ends before its array does"),
    "truncated between rows": (b'[\n{"a": "1"},\n', 3, "truncated JSON: the file ends before its array does"),
    "invalid": (b'[\n{"a": "1"},\n{"a": x' + b" " * 30 + b"}]", 3, "invalid JSON: Expecting value"),
    "no comma": (b'[\n{"a": "1"}\n{"a": "2"}]' + b" " * 30, 3, "invalid JSON: Expecting ',' delimiter"),
    "two commas": (b'[\n{"a": "1"},,\n{"a": "2"}]' + b" " * 30, 2, "invalid JSON: Expecting value"),
    "not UTF-8": (b'[\n{"a": "1"},\n{"a": "caf\xe9"}]', 3, "not UTF-8: byte 0xE9"),
    "NaN": (b'[\n{"a": "1"},\n{"a": NaN}]', 3, "holds NaN, which is no JSON value"),
    "too long": (b'[\n{"a": "1"},\n{"a": "' + b"x" * 300 + b'"}]', 3, "an element of the array is longer than"),
}


@pytest.mark.parametrize("chunk_bytes", [1, 16])
@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_broken_array_gives_its_rows_up_to_the_fault(tmp_path, kind, chunk_bytes):
    content, line, cause = BAD_ARRAYS[kind]
    records, bad = read(write(tmp_path / "rows.json", content), limit=100, chunk_bytes=chunk_bytes)
    assert records == [(2, {"a": "1"})]
    assert len(bad) == 1
    assert bad[0].startswith(f"rows.json:{line}: {cause}")
    assert bad[0].endswith("what follows cannot be told apart")


def test_wrong_rows_within_an_array_do_not_end_it(tmp_path):
    records, bad = read(write(tmp_path / "rows.json", '[{"a": "1"},\n"text",\n{"a": "x\\u0000"}, {"a": "2"}]'))
    assert [record["a"] for _, record in records] == ["1", "2"]
    assert bad == [
        "rows.json:2: a row must be an object with named fields, but this is text",
        "rows.json:3: field 'a' holds a NUL character",
    ]


def test_text_after_an_array_is_noticed(tmp_path):
    assert read(write(tmp_path / "rows.json", '[{"a": "1"}]\n[{"a": "2"}]'))[1] == [
        "rows.json:1: the file goes on after the end of its array"
    ]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b'{\n"data": [{"a": "1"}, {"a"', "rows.json:2: truncated JSON"),
        (b'{\n"data": [{"a": 1}, x]}', "rows.json:2: invalid JSON at column 20: Expecting value"),
        (b'{\n"data": [{"a": NaN}]}', "rows.json: holds NaN, which is no JSON value"),
        (b'{\n"data": [{"a": "\xff"}]}', "rows.json:2: not UTF-8: byte 0xFF"),
    ],
)
def test_a_broken_object_is_named(tmp_path, content, cause):
    assert read(write(tmp_path / "rows.json", content)) == ([], [cause])


BAD_CSV = {
    "too few": (b"a,b\n1,2\n3\n4,5\n", ["rows.csv:3: the row has 1 fields, the header 2"], 2),
    "too many": (b"a,b\n1,2\n3,4,5\n4,5\n", ["rows.csv:3: the row has 3 fields, the header 2"], 2),
    "not UTF-8": (b"a,b\n1,2\ncaf\xe9,4\n4,5\n", ["rows.csv:3: not UTF-8: byte 0xE9 in field 'a'"], 2),
    "NUL": (b"a,b\n1,2\nx\x00,4\n4,5\n", ["rows.csv:3: field 'a' holds a NUL character"], 2),
    "unended": (
        b'a,b\n1,2\n"3,4\n4,5\n',
        ["rows.csv:4: invalid CSV: unexpected end of data; what follows cannot be told apart"],
        1,
    ),
    "too long": (
        b"a,b\n1,2\n" + b"x" * 200 + b",4\n",
        ["rows.csv:2: invalid CSV: a row is longer than --max-line-bytes 100; what follows cannot be told apart"],
        1,
    ),
    "header twice": (b"a,a\n1,2\n", ["rows.csv:1: the header names a column twice or not at all ('a', 'a')"], 0),
    "header empty": (b"a,\n1,2\n", ["rows.csv:1: the header names a column twice or not at all ('a', '')"], 0),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_csv_row_is_named(tmp_path, kind):
    content, expected, good = BAD_CSV[kind]
    records, bad = read(write(tmp_path / "rows.csv", content), limit=100)
    assert bad == expected
    assert len(records) == good


def test_csv_rows_are_numbered_by_lines(tmp_path):
    path = write(tmp_path / "rows.csv", 'a,b\n1,2\n\n"x\ny",3\n5\n')
    assert read(path) == (
        [(2, {"a": "1", "b": "2"}), (5, {"a": "x\ny", "b": "3"})],
        ["rows.csv:6: the row has 1 fields, the header 2"],
    )


@pytest.mark.parametrize(
    ("name", "content", "records", "causes"),
    [
        ("rows.csv", "sep=;\r\na;b\r\n1;2,5\r\n", [(3, {"a": "1", "b": "2,5"})], []),
        (
            "rows.csv",
            "\ufeffsep=|\n\na|a\n",
            [],
            ["rows.csv:3: the header names a column twice or not at all ('a', 'a')"],
        ),
        ("rows.csv", "a|b\n1|2\n", [(2, {"a": "1", "b": "2"})], []),
        ("rows.csv", "\r\n\na;b\n1;2\n", [(4, {"a": "1", "b": "2"})], []),
        (
            "rows.csv",
            "\ufeffa,b\n1,2\n\ufeffa,b\n\ufeff3,4\n",
            [(2, {"a": "1", "b": "2"}), (4, {"a": "3", "b": "4"})],
            ["rows.csv:3: the row repeats the header, as where files were joined"],
        ),
        ("rows.csv", "word\nword\n", [(2, {"word": "word"})], []),
        ("rows.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": "\ufeff"}\n', [(1, {"a": 1}), (2, {"a": "\ufeff"})], []),
    ],
)
def test_what_excel_writes_and_files_that_were_joined(tmp_path, name, content, records, causes):
    assert read(write(tmp_path / name, content)) == (records, causes)


@pytest.mark.parametrize(
    ("content", "are_letters"),
    [
        ('q\ta\nOne\tone\n"Two\ttwo\nThree\tthree\nFour"\tfour\nFive\tfive\n', True),
        ('q\ta\nOne\tone\n"Two" more\ttwo\n', True),
        ('q\ta\n"Print:\nx"\t"Sure:\n\tx := 1\n"\n', False),
    ],
)
def test_a_quote_that_is_a_letter_takes_no_rows_into_a_field_of_tabs(tmp_path, content, are_letters):
    chunks = read_chunks(write(tmp_path / "DATA.tsv", content), "DATA.tsv", LIMIT, CHUNK_BYTES)
    bad = [bad for chunk in chunks for bad in chunk.bad_rows]
    assert bool(bad) == are_letters
    if are_letters:
        command = bad[0].way[bad[0].way.index("python -c") :].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        records, causes = read(tmp_path / "clean.tsv")
        assert not causes and [record["a"] for _, record in records] == [
            line.split("\t")[1] for line in content.splitlines()[1:]
        ]


HTML = b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>"


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt", "rows.parquet", "rows.jsonl.gz"]
)
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (HTML, "this is an HTML page, not data (a download that went wrong?)"),
        (b"\n  <HTML lang='en'>", "this is an HTML page, not data (a download that went wrong?)"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8: the file is in UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer, not the data itself"),
    ],
)
def test_files_that_are_something_else_are_reported(tmp_path, name, content, cause):
    assert read(write(tmp_path / name, content)) == ([], [f"{name}: {cause}"])


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_broken_parquet_is_reported(tmp_path, keep):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    records, (bad,) = read(path)
    assert not records
    assert bad.startswith("rows.parquet: broken Parquet: ")


def test_parquet_with_a_flipped_page_gives_the_rows_before_it(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"a": f"{i} " + "x" * 50} for i in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    records, bad = read(path)
    assert len(bad) == 1
    assert "broken Parquet" in bad[0]
    assert 0 < len(records) < 4000


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    broken = pa.array([b"fine", b"caf\xe9", b"too"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    pq.write_table(pa.table({"a": text}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == (
        [(1, {"a": "fine"}), (3, {"a": "too"})],
        ["rows.parquet:2: not UTF-8: byte 0xE9"],
    )


@pytest.mark.each_choice
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_compressed_data_cut_short_is_noticed(tmp_path, suffix, members, keep):
    path = tmp_path / f"rows.jsonl{suffix}"
    content = as_jsonl([{"a": random.Random(i).randbytes(20).hex()} for i in range(5000)]).encode()
    size = len(content) // members
    packed = b"".join(COMPRESS[suffix](content[i : i + size]) for i in range(0, len(content), size))
    path.write_bytes(packed[: int(len(packed) * keep)])
    _, bad = read(path)
    assert f"rows.jsonl{suffix}: the compressed data is broken or cut short ({CUT_SHORT[suffix]})" in bad


def test_gzip_that_is_padded_with_zeros_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(ROWS).encode()) + bytes(512))
    records, bad = read(path)
    assert not bad and [record for _, record in records] == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_data_that_is_not_compressed_at_all_is_noticed(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(GOOD)
    assert read(path)[1] == [
        f"rows.jsonl{suffix}: the file is named {suffix} but is not compressed; rename it rows.jsonl"
    ]
    path.write_bytes(COMPRESS[suffix](GOOD) + b"something else")
    assert "the compressed data is broken or cut short" in read(path)[1][-1]
    path.write_bytes(b"")
    assert read(path) == ([], [f"rows.jsonl{suffix}: the file is empty"])


def test_a_file_that_cannot_be_opened_is_reported(tmp_path):
    assert read(tmp_path / "absent.jsonl")[1] == ["absent.jsonl: cannot be read (No such file or directory)"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_and_its_name_agree_on_how_it_is_compressed(tmp_path, suffix):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(COMPRESS[suffix](GOOD))
    assert read(path) == ([], [f"rows.jsonl: the file is compressed; rename it rows.jsonl{suffix}"])
    other = ".gz" if suffix != ".gz" else ".xz"
    path = path.rename(tmp_path / f"rows.jsonl{other}")
    said = f"the file is named {other} but is of the kind {suffix}; rename it rows.jsonl{suffix}"
    assert read(path) == ([], [f"rows.jsonl{other}: {said}"])


@pytest.mark.each_choice
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_opens_up_to_gigabytes_is_bounded_before_it_is_held(tmp_path, name, suffix):
    import tracemalloc

    path = tmp_path / f"{name}{suffix}"
    begin = {"rows.json": b'[{"a": "', "rows.csv": b'a,b\n"'}.get(name, b'{"a": "')
    path.write_bytes(COMPRESS[suffix](begin + (b"x" * 1023 + (b"\n" if name == "rows.csv" else b"x")) * 2**14))
    tracemalloc.start()
    records, bad = read(path, limit=2**18)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not records
    assert "longer than --max-line-bytes 262144" in bad[0]
    assert peak_bytes < 8 * 2**20


def test_an_object_of_very_many_lists_is_refused_before_it_is_parsed(tmp_path):
    path = write(tmp_path / "rows.json", '{"a": [' + "[]," * 2**21 + "[]]}")
    assert read(path, limit=2**23) == ([], ["rows.json: holds one JSON object of more than 2097152 lists and objects"])


def parquet_rows(path, most_bytes, limit=LIMIT):
    """(records, bad rows, most letters of a chunk) of a Parquet file."""
    records, bad, most = [], [], 0
    with path.open("rb") as file:
        for chunk in read_parquet(file, path.name, path.stat().st_size, limit, most_bytes):
            records += [record["a"] for record in chunk.records]
            bad += map(str, chunk.bad_rows)
            most = max(most, sum(len(record["a"]) for record in chunk.records))
    return records, bad, most


def test_a_page_of_parquet_is_bounded_before_it_is_opened(tmp_path):
    path = tmp_path / "rows.parquet"
    write = "import sys, pyarrow as pa, pyarrow.parquet as pq;"
    write += "pq.write_table(pa.table({'a': ['x' * 2**26]}), sys.argv[1], compression='zstd', use_dictionary=False)"
    subprocess.run([sys.executable, "-c", write, str(path)], check=True)  # what was freed here could be used again
    read = "import sys, json, pathlib; from tests.reading.test_readers import parquet_rows;"
    read += "records, bad, _ = parquet_rows(pathlib.Path(sys.argv[1]), most_bytes=2**25, limit=2**30);"
    read += "print(json.dumps([len(records), bad]))"  # nor what other tests freed in this process
    found = subprocess.run([sys.executable, "-c", read, str(path)], check=True, capture_output=True, cwd=PROJECT)
    count, bad = json.loads(found.stdout)
    assert not count
    assert bad == ["rows.parquet:1: opening row 1 takes more than 32 MiB of memory; write the file with smaller pages and row groups"]  # fmt: skip


def test_a_long_text_that_parquet_stores_once_is_opened_a_few_times_at_once(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pa.array(["x" * 1_000_000, "y", "z"])
    numbers = [0] * 200 + [1, 2] * 20
    once = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), texts)
    pq.write_table(pa.table({"a": once}), path, compression="zstd")
    records, bad, most = parquet_rows(path, most_bytes=2**26)
    assert not bad
    assert [len(text) for text in records] == [1_000_000 if number == 0 else 1 for number in numbers]
    assert most <= 2**23
    assert len(parquet_rows(path, 2**26, limit=2**10)[1]) == 200


def test_long_rows_come_in_small_chunks_from_every_kind_of_file(tmp_path):
    rows = [{"a": "x" * 2**19 + str(i)} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text(as_csv(rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "table.json").write_text(json.dumps({"data": rows}))
    for path in tmp_path.iterdir():
        chunks = list(read_chunks(path, path.name, LIMIT * 16))
        assert [record for chunk in chunks for record in chunk.records] == rows
        assert max(len(chunk.records) for chunk in chunks) <= 9


def test_a_long_element_of_an_array_travels_as_it_was_written(tmp_path):
    """Parsed it may take 26 times as much memory: only the process that tokenises it builds it."""
    long = {"text": 'a "quoted" \\ [bracket} \\"' * 40_000, "more": [[], {"b": "]"}] * 3}
    rows = [{"text": "short"}, long, {"text": "after"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    chunks = list(read_chunks(path, "rows", 2**24))
    assert [chunk.kind for chunk in chunks if chunk.is_long] == ["element"]
    assert not any(chunk.records for chunk in chunks if chunk.is_long)
    for chunk in chunks:
        parse_chunk(chunk, 2**24)
    assert [record for chunk in chunks for record in chunk.records] == rows
    assert [line for chunk in chunks for line in chunk.lines] == [2, 5, 22]
    path.write_text(json.dumps(rows)[:-40])
    (*_, last) = read_chunks(path, "rows", 2**24)
    assert last.bad_rows


def test_a_long_broken_element_is_a_bad_row_and_what_follows_is_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "' + "a" * 2**21 + '", "b": nul}, {"text": "after"}]')
    chunks = list(read_chunks(path, "rows", 2**24))
    for chunk in chunks:
        parse_chunk(chunk, 2**24)
    assert [record for chunk in chunks for record in chunk.records] == [{"text": "after"}]
    assert [bad.line for chunk in chunks for bad in chunk.bad_rows] == [1]


def test_a_header_of_very_many_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{i}" for i in range(20_000)) + "\n")
    (chunk,) = read_chunks(path, "rows", 2**24)
    assert "20,000 columns" in chunk.bad_rows[0].cause


def test_long_lines_are_left_out_without_being_held(tmp_path):
    import tracemalloc

    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD + b'{"a": "')
        for _ in range(60):
            stream.write(b"x" * 2**20)
        stream.write(b'"}\n' + GOOD)
    tracemalloc.start()
    records, bad = read(path, limit=2**20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for line, _ in records] == [1, 3]
    assert bad == ["rows.jsonl:2: longer than --max-line-bytes 1048576"]
    assert peak_bytes < 12 * 2**20


def test_names_give_kinds():
    from pathlib import Path

    known = {name: kind_of(Path(name)) for name in ("a.JSON", "b.jsonl.zst", "c.d.parquet", "e.txt.gz", "f.tsv")}
    assert known == {
        "a.JSON": "json",
        "b.jsonl.zst": "jsonl",
        "c.d.parquet": "parquet",
        "e.txt.gz": "txt",
        "f.tsv": "tsv",
    }
    assert [kind_of(Path(name)) for name in ("a.pdf", "README.md", "data", "a.gz", "json")] == [None] * 5


def test_bad_rows_read_well():
    assert str(BadRow("a.jsonl", 3, "is bad")) == "a.jsonl:3: is bad"
    assert str(BadRow("a.jsonl", None, "is bad")) == "a.jsonl: is bad"


def test_splits_in_one_object_are_not_read_as_one_conversation(tmp_path):
    pair = {"question": "q", "answer": "a"}
    for tests in ([pair], [pair, pair]):
        path = write(tmp_path / "rows.json", json.dumps({"train": [pair, pair], "test": tests}))
        cause = "holds one JSON object with the lists 'train' and 'test'; write each to a file of its own"
        assert read(path) == ([], [f"rows.json: {cause}"])
    assert len(read(write(tmp_path / "rows.json", json.dumps({"train": [pair, pair]})))[0]) == 2
