"""Which kernels a worker uses: FlashInfer and Triton on NVIDIA devices that can, plain torch elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shutil
from dataclasses import dataclass
from typing import Protocol

import torch

from seesaw_ds.layout import Phase
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.ops.torch_ops import TorchOps
from seesaw_ds.parallel.device import is_cuda
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)


def _why_not_flashinfer(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype={str(dtype).removeprefix('torch.')}: FlashInfer's kernels take bfloat16 and float16"
    if head_dim not in (64, 128, 256):
        return f"head_dim={head_dim}: FlashInfer's kernels take 64, 128 and 256"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed; pip install seesaw-ds[cuda]"
    if shutil.which("nvcc") is None and importlib.util.find_spec("flashinfer_jit_cache") is None:
        return "no nvcc on PATH to compile FlashInfer's kernels; install the CUDA toolkit or flashinfer-jit-cache"
    return None


@dataclass(frozen=True)
class TorchBackends:
    """Plain torch everywhere."""

    block_size: int
    device: torch.device
    ops: LayerOps = dataclasses.field(default_factory=TorchOps)
    has_graphs: bool = False

    def make_attention(self, phase: Phase, tp: int, max_num_seqs: int = 0, max_num_blocks: int = 0) -> AttentionBackend:
        return TorchAttention(self.block_size, self.device)


@dataclass(frozen=True)
class CudaBackends:
    """FlashInfer's kernels and our own. Nothing in a decode step touches the host, so it can be captured."""

    shape: ModelShape
    block_size: int
    dtype: torch.dtype
    device: torch.device
    ops: LayerOps
    has_graphs: bool = True

    def make_attention(self, phase: Phase, tp: int, max_num_seqs: int = 0, max_num_blocks: int = 0) -> AttentionBackend:
        from seesaw_ds.model.attention.flashinfer_backend import FlashInferDecode, FlashInferPrefill

        heads = (self.shape.num_heads // tp, self.shape.num_kv_heads // tp, self.shape.head_dim)
        if phase is Phase.PREFILL:
            return FlashInferPrefill(*heads, self.block_size, self.dtype, self.device)
        return FlashInferDecode(*heads, self.block_size, max_num_seqs, max_num_blocks, self.dtype, self.device)


class Backends(Protocol):
    """`ops` for every layer, an attention backend for each phase.

    `has_graphs`: decode steps may be captured as CUDA graphs. A decode backend is made for at most `max_num_seqs`
    sequences whose tables hold at most `max_num_blocks` blocks together.
    """

    @property
    def ops(self) -> LayerOps: ...

    @property
    def has_graphs(self) -> bool: ...

    def make_attention(
        self, phase: Phase, tp: int, max_num_seqs: int = 0, max_num_blocks: int = 0
    ) -> AttentionBackend: ...


def choose_backends(shape: ModelShape, block_size: int, dtype: torch.dtype, device: torch.device) -> Backends:
    """The fastest kernels this device, dtype and model can use; says on the log why when they are the slow ones."""
    if not is_cuda(device):
        return TorchBackends(block_size, device)
    reason = _why_not_flashinfer(dtype, shape.head_dim)
    if reason is not None:
        logger.warning("attention in plain torch, several times slower: %s", reason)
        return TorchBackends(block_size, device)

    from seesaw_ds.model.ops.cuda_ops import CudaOps

    return CudaBackends(shape, block_size, dtype, device, CudaOps())
