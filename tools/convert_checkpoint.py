"""Convert a checkpoint: Hugging Face safetensors, Megatron-core torch_dist and Seesaw's cells, each into each.

    python tools/convert_checkpoint.py models/llama models/llama-cells --to cells --max-tp 8 --verify

The source's format is detected. The same command goes on with a conversion that was stopped. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.checkpoint.formats import FORMATS
from seesaw_ds.errors import UserError
from seesaw_ds.shapes import DTYPE_BYTES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="folder to read")
    parser.add_argument("dst", type=Path, help="folder to make")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format of DST")
    parser.add_argument(
        "--max-tp",
        type=int,
        metavar="T",
        help="cells per layer, for --to cells: layouts whose TP sizes divide T can load it (default: 8, or less where "
        "the KV heads ask for it)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="what weights become (default: as they are)")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare checksums")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at DST")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="threads; each holds about three of the largest weights (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.jobs < 1:
        print(f"error: --jobs {arguments.jobs}: must be at least 1", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the jobs are the threads
    try:
        manifest = convert(Conversion(**vars(arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    cells = f", {manifest.num_cells} cells per layer" if manifest.num_cells else ""
    print(f"{arguments.dst}: {len(manifest.weights)} weights from {manifest.source_format} to {manifest.format}{cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
