"""CUDA kernels of our own: compiled on the machine, as FlashInfer's are, for the devices that they were written for."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

logger = logging.getLogger(__name__)

# Where they were measured: H200. They take up to 200 KiB of shared memory for a thread block.
_CAPABILITY = (9, 0)
_COMMON = Path(__file__).with_suffix(".cuh")


class OwnKernel:
    """The kernels of one CUDA source. `instead`: what there is without them, for the log."""

    def __init__(self, source: Path, instead: str, flags: Sequence[str] = ()) -> None:
        self._source = source
        self._instead = instead
        self._flags = list(flags)

    def can_run(self, device: torch.device) -> bool:
        """Whether it is for this device, and there, or a compiler for it."""
        return (
            torch.cuda.get_device_capability(device) == _CAPABILITY
            and importlib.util.find_spec("flashinfer") is not None
            and (self.spec.is_compiled or shutil.which("nvcc") is not None)
        )

    @functools.cached_property
    def spec(self) -> JitSpec:
        """By another name when its source or flags change."""
        from flashinfer.jit import env
        from flashinfer.jit.core import gen_jit_spec

        sources = [self._source, _COMMON, *sorted(self._source.parent.glob("*.cuh"))]
        content = b"".join(source.read_bytes() for source in sources) + " ".join(self._flags).encode()
        return gen_jit_spec(
            f"seesaw_{self._source.stem}_{hashlib.sha256(content).hexdigest()[:12]}",
            [self._source],
            extra_cuda_cflags=self._flags,
            extra_include_paths=[env.FLASHINFER_CSRC_DIR, _COMMON.parent],
        )

    @functools.cached_property
    def loads(self) -> bool:
        """Whether it is there now, compiled before or here. If that fails the log says so, and what is used instead."""
        try:
            _ = self.module
        except Exception as error:
            logger.warning("%s, since %s does not compile: %s", self._instead, self._source.name, error)
            return False
        return True

    @functools.cached_property
    def module(self) -> Any:
        """Has the functions that the source exports."""
        return self.spec.build_and_load()
