"""``conversion.json``: what a converted checkpoint is, what it was made from, and a checksum of every weight."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from seesaw_ds.errors import UserError

MANIFEST = "conversion.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file of the source, with its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ConversionManifest:
    """The contents of ``conversion.json``.

    `num_cells` is T of the cells format and None for the others. `dtype` is what weights were cast to, None when
    they were kept. `weights` maps each weight (in the fused form of `parts`, after the cast) to its CRC-32 in
    hexadecimal, of the bytes in row-major order.
    """

    format: str
    source: str
    source_format: str
    num_cells: int | None = None
    dtype: str | None = None
    version: int = VERSION
    source_files: dict[str, SourceFile] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into `folder`, durably."""
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> ConversionManifest:
    """The manifest of `folder`. Raises UserError when it cannot be read or is of another version."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise UserError(f"{path}: version {values['version']}; this one reads version {VERSION}: convert again")
        values["source_files"] = {name: SourceFile(**item) for name, item in values["source_files"].items()}
        return ConversionManifest(**values)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a conversion manifest ({error!r})") from None
