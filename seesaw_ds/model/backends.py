"""Which kernels a worker uses: FlashInfer and Triton on NVIDIA devices that can, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from dataclasses import dataclass, field
from typing import Protocol

import torch

from seesaw_ds.layout import Phase
from seesaw_ds.model.attention.interface import AttentionBackend, AttentionRule, FixedAttention
from seesaw_ds.model.attention.torch_backend import TorchAttention
from seesaw_ds.model.ops.interface import LayerOps
from seesaw_ds.model.ops.torch_ops import TorchOps
from seesaw_ds.model.sampling_draw import Draw, TorchDraw
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


def _rules(shape: ModelShape) -> list[AttentionRule]:
    """One for each of the shape's attention kinds."""
    scale = shape.head_dim**-0.5 if shape.attention_scale is None else shape.attention_scale
    return [AttentionRule(scale, shape.attention_soft_cap, kind.window) for kind in shape.attention_kinds]


@dataclass(frozen=True)
class TorchBackends:
    """Plain torch everywhere."""

    shape: ModelShape
    block_size: int
    device: torch.device
    ops: LayerOps
    draw: Draw = field(default_factory=TorchDraw)
    has_graphs: bool = False

    def compile_kernels(self) -> None:
        pass

    def workspace_bytes(self, tp: int, max_num_seqs: int) -> int:
        return 0

    def make_attention(
        self, phase: Phase, tp: int, workspace: torch.Tensor, max_num_seqs: int = 0, max_num_blocks: int = 0
    ) -> tuple[AttentionBackend, ...]:
        return tuple(TorchAttention(rule, self.block_size, self.device) for rule in _rules(self.shape))

    def make_fixed_attention(
        self, tp: int, workspace: torch.Tensor, num_tokens: int, max_num_rows: int, max_num_blocks: int
    ) -> tuple[FixedAttention, ...]:
        return ()


@dataclass(frozen=True)
class CudaBackends:
    """FlashInfer's kernels and our own. Nothing of these in a decode step touches the host, so it can be captured."""

    shape: ModelShape
    block_size: int
    dtype: torch.dtype
    device: torch.device
    ops: LayerOps
    draw: Draw
    has_graphs: bool

    def compile_kernels(self) -> None:
        from seesaw_ds.model.kernel_library import compile_kernels, needed_kernels

        shape = self.shape
        compile_kernels(
            needed_kernels(
                _rules(shape),
                shape.num_heads // shape.num_kv_heads,
                shape.head_dim,
                self.block_size,
                self.dtype,
                shape.family.activation,
                self.device,
            )
        )

    def workspace_bytes(self, tp: int, max_num_seqs: int) -> int:
        from seesaw_ds.model.attention.flashinfer_backend import workspace_bytes

        return workspace_bytes(max_num_seqs, self.shape.num_heads // tp, self.shape.head_dim)

    def make_attention(
        self, phase: Phase, tp: int, workspace: torch.Tensor, max_num_seqs: int = 0, max_num_blocks: int = 0
    ) -> tuple[AttentionBackend, ...]:
        from seesaw_ds.model.attention.flashinfer_backend import FlashInferPrefill, make_decode

        heads, rules = self._heads(tp), _rules(self.shape)
        if phase is Phase.PREFILL:
            return tuple(
                FlashInferPrefill(rule, *heads, self.block_size, workspace, self.dtype, self.device) for rule in rules
            )
        sizes = (self.block_size, max_num_seqs, max_num_blocks)
        return tuple(make_decode(rule, *heads, *sizes, workspace, self.dtype, self.device) for rule in rules)

    def _heads(self, tp: int) -> tuple[int, int, int]:
        """A rank's query and KV heads, and their size."""
        return self.shape.num_heads // tp, self.shape.num_kv_heads // tp, self.shape.head_dim

    def make_fixed_attention(
        self, tp: int, workspace: torch.Tensor, num_tokens: int, max_num_rows: int, max_num_blocks: int
    ) -> tuple[FixedAttention, ...]:
        from seesaw_ds.model.attention.flashinfer_backend import make_fixed_prefill

        sizes = (*self._heads(tp), self.block_size, num_tokens, max_num_rows, max_num_blocks)
        made = [make_fixed_prefill(rule, *sizes, workspace, self.dtype, self.device) for rule in _rules(self.shape)]
        fixed = tuple(attention for attention in made if attention is not None)
        return fixed if len(fixed) == len(made) else ()


class Backends(Protocol):
    """`ops` for every layer, `draw` for the sampler, and for each phase an attention backend for each attention kind.

    `has_graphs`: decode steps may be captured as CUDA graphs. A backend is made for at most `max_num_seqs` sequences
    that decode in a step; that of the decode phase for tables of at most `max_num_blocks` blocks together. All may
    have the same workspace, for they use it in turn.
    """

    @property
    def ops(self) -> LayerOps: ...

    @property
    def draw(self) -> Draw: ...

    @property
    def has_graphs(self) -> bool: ...

    def compile_kernels(self) -> None:
        """Compile what the machine lacks of the library's kernels. For one process of a node, while the others wait."""

    def workspace_bytes(self, tp: int, max_num_seqs: int) -> int:
        """Bytes of device memory, uint8, that a backend of either phase needs while a step runs."""

    def make_attention(
        self, phase: Phase, tp: int, workspace: torch.Tensor, max_num_seqs: int = 0, max_num_blocks: int = 0
    ) -> tuple[AttentionBackend, ...]: ...

    def make_fixed_attention(
        self, tp: int, workspace: torch.Tensor, num_tokens: int, max_num_rows: int, max_num_blocks: int
    ) -> tuple[FixedAttention, ...]:
        """Attention, of each kind, for prefill micro-batches of `num_tokens` tokens with at most so many decode rows,
        and blocks of all their sequences. None at all where plans of some kind cannot stay in place."""


def choose_backends(shape: ModelShape, block_size: int, dtype: torch.dtype, device: torch.device) -> Backends:
    """The fastest kernels this device, dtype and model can use; says on the log why when they are the slow ones."""
    settings = (shape.family.activation, shape.family.norm_adds_one)
    if not is_cuda(device):
        return TorchBackends(shape, block_size, device, TorchOps(*settings))
    reason = _why_not_flashinfer(dtype, shape.head_dim)
    if reason is not None:
        logger.warning("attention in plain torch, several times slower: %s", reason)
        return TorchBackends(shape, block_size, device, TorchOps(*settings))

    from seesaw_ds.model.ops.cuda_ops import CudaOps
    from seesaw_ds.model.ops.cuda_sampling import CudaDraw
    from seesaw_ds.model.ops.row_kernels import make_row_kernels

    has_graphs = _can_capture(shape, dtype, device)
    ops = CudaOps(*settings, make_row_kernels(dtype, device))
    return CudaBackends(shape, block_size, dtype, device, ops, CudaDraw(), has_graphs)


def _can_capture(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the experts' grouped products leave the host alone: for bfloat16 from Hopper on they are one kernel."""
    if not shape.num_experts or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= 9):
        return True
    logger.warning("no CUDA graphs: torch routes tokens to experts on the host, unless in bfloat16 on Hopper or later")
    return False
