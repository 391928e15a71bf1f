"""The small files beside the weights: config, tokenizer, chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from seesaw_ds.shapes import read_hf_config

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "USE_POLICY*",
    "README*",
)
"""Files that travel along, as they are (but for the dtype in config.json when weights are cast)."""


def copy_companions(src: Path, dst: Path, dtype: str | None) -> None:
    """Copy the files of `COMPANIONS`; `dtype`, unless None, is put into config.json."""
    for pattern in COMPANIONS:
        for path in sorted(src.glob(pattern)):
            if path.is_file():
                target = dst / path.relative_to(src)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    if dtype is not None:
        config = read_hf_config(src)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
