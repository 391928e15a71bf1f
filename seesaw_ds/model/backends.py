"""Which kernels a worker uses: FlashInfer and Triton on NVIDIA devices that can, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from dataclasses import dataclass

import torch

from seesaw_ds.layout import LayoutPair, Phase
from seesaw_ds.model.attention.interface import AttentionBackend
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.ops.torch_ops import TorchOps
from seesaw_ds.parallel.device import is_cuda
from seesaw_ds.shapes import ModelShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """`has_graphs`: decode steps may be captured, for nothing in them touches the host."""

    ops: LayerOps
    attention: dict[Phase, AttentionBackend]
    has_graphs: bool


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


def choose_backends(
    shape: ModelShape,
    layouts: LayoutPair,
    block_size: int,
    max_num_seqs: int,
    num_decode_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Backends:
    """The fastest kernels this device, dtype and model can use; says on the log why when they are the slow ones."""
    reason = _why_not_flashinfer(dtype, shape.head_dim) if is_cuda(device) else ""
    if reason is not None:
        if reason:
            logger.warning("attention in plain torch, several times slower: %s", reason)
        attention = TorchAttention(block_size, device)
        return Backends(TorchOps(), dict.fromkeys(Phase, attention), has_graphs=False)

    from seesaw_ds.model.attention.flashinfer_backend import FlashInferDecode, FlashInferPrefill
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    heads = {
        phase: (shape.num_heads // layouts[phase].tp, shape.num_kv_heads // layouts[phase].tp, shape.head_dim)
        for phase in Phase
    }
    return Backends(
        CudaOps(),
        {
            Phase.PREFILL: FlashInferPrefill(*heads[Phase.PREFILL], block_size, dtype, device),
            Phase.DECODE: FlashInferDecode(
                *heads[Phase.DECODE], block_size, max_num_seqs, num_decode_blocks + max_num_seqs, dtype, device
            ),
        },
        has_graphs=True,
    )
