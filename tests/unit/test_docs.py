"""What the documents name must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]
# A name in backticks that looks like a path: folders or a known ending, no spaces, nothing to be filled in.
_PATH = re.compile(r"`([A-Za-z_.][\w./-]*(?:/|\.(?:py|md|yaml|jsonl|txt)))`")
# Made by a run, or not ours.
_NOT_HERE = ("out/", "models/", ".venv", "launch.py")


def named_paths(document: Path) -> list[str]:
    return [name for name in _PATH.findall(document.read_text(encoding="utf-8")) if not name.startswith(_NOT_HERE)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_named_in_documents_exist(document: Path):
    bases = (ROOT, ROOT / "seesaw_ds", ROOT / "launch", document.parent)
    missing = [name for name in named_paths(document) if not any((base / name).exists() for base in bases)]
    assert not missing


def test_paths_are_found_at_all():
    names = named_paths(ROOT / "README.md")
    assert "seesaw_ds/sched/scheduler.py" in names and len(names) >= 8


def test_modules_hold_no_line_of_an_unfinished_kind():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError")
    sources = [path for folder in ("seesaw_ds", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if unfinished.search(path.read_text(encoding="utf-8"))] == []
