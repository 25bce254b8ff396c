"""Pages name only scripts, modules and flags that exist, and the index of benchmarks names every script."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = sorted([*ROOT.glob("*.md"), *BENCHMARKS.glob("*.md")])
FOLDERS = (ROOT, ROOT / "qlora_cli", BENCHMARKS)  # what a page's paths may start at


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_python_that_a_page_names_exists(page):
    for name in re.findall(r"[\w./-]+\.py\b", page.read_text(encoding="utf-8")):
        if name.startswith("llama.cpp/"):
            continue  # another project's
        found = any((folder / name).is_file() for folder in FOLDERS)
        if "/" not in name:
            found = found or any(ROOT.glob(f"qlora_cli/**/{name}"))
        assert found, f"{page.name} names {name}"


@pytest.mark.parametrize("source", [*PAGES, *sorted(BENCHMARKS.glob("*.py"))], ids=lambda path: path.name)
def test_every_flag_of_a_quoted_benchmark_exists(source):
    known = "".join(path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("*.py"))
    text = source.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"python (?:benchmarks/)?\w+\.py .*", text):
        for flag in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", line):
            assert f'"{flag}"' in known, f"{source.name}: {line}"


def test_the_index_of_benchmarks_names_every_script_and_page():
    index = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("*.md")]:
        assert path.name == "README.md" or f"`{path.name}`" in index or f"({path.name})" in index, path.name
    for path in (BENCHMARKS / "support").glob("*.py"):
        assert f"`support/{path.name}`" in index


def test_no_folder_has_more_than_12_modules_and_no_module_more_than_400_lines():
    modules = sorted((ROOT / "qlora_cli").rglob("*.py"))
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in modules if path.name != "__init__.py")
    assert {folder: count for folder, count in folders.items() if count > 12} == {}
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}
