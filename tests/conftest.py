"""What all tests share."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

# Before torch is imported: many test processes share few cores, and one thread adds up in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as tools/make_tiny_model.py writes it, with a small vocabulary and hardly trained.

    4 layers, 16 heads, 8 KV heads, 2048 positions, a byte-level BPE tokenizer, a chat template.
    """
    from make_tiny_model import make_tiny_model
    from tiny_corpus import read_docstrings

    folder = tmp_path_factory.mktemp("models") / "tiny"
    docs = read_docstrings(Path(sysconfig.get_paths()["stdlib"]), modules=("heapq", "queue"))
    make_tiny_model(folder, docs, vocab_size=512, steps=3)
    return folder
