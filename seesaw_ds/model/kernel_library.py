"""FlashInfer's kernels for a model, and our own in CUDA, compiled all at once.

FlashInfer compiles a kernel at its first use on a machine, one after the other: minutes in all. Which ones a model
needs is known beforehand, so that they can be compiled side by side, and somebody can be told to wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from seesaw_ds.model.attention.interface import AttentionRule
from seesaw_ds.model.families.family import Activation

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

logger = logging.getLogger(__name__)


def needed_kernels(
    rules: Sequence[AttentionRule],
    group_size: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    activation: Activation,
    device: torch.device,
) -> list[JitSpec]:
    """The modules that `FlashInferPrefill`, `make_decode`, `CudaOps` and the one-shot all-reduce load.

    `group_size`: query heads of a KV head.
    """
    from flashinfer.jit import gen_act_and_mul_module, gen_batch_prefill_module, gen_vllm_comm_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.utils import PosEncodingMode, determine_attention_backend

    from seesaw_ds.model.attention.row_attention import ROW_ATTENTION, can_attend_rows
    from seesaw_ds.model.ops.row_kernels import row_kernels

    no_rotation = PosEncodingMode.NONE.value  # RoPE is our own
    # Chunks have what FlashInfer takes for "auto"; rows a kernel of our own, or fa2.
    chunks = determine_attention_backend(device, no_rotation, False, False, dtype, dtype)
    own = [rule for rule in rules if can_attend_rows(rule, group_size, head_dim, block_size, device)]
    backends = [(chunks, rule) for rule in rules] + [("fa2", rule) for rule in rules if rule not in own]
    attention = {(backend, rule.window is not None, rule.soft_cap is not None) for backend, rule in backends}
    return [
        *([ROW_ATTENTION.spec] if own else []),
        *([kernels.spec] if (kernels := row_kernels(dtype, device)) is not None else []),
        gen_norm_module(),
        gen_act_and_mul_module(activation),
        gen_vllm_comm_module(),
        *(
            gen_batch_prefill_module(
                backend, dtype, dtype, dtype, torch.int32, head_dim, head_dim, no_rotation, has_window, has_cap, False
            )
            for backend, has_window, has_cap in sorted(attention)
        ),
    ]


def compile_kernels(specs: Sequence[JitSpec]) -> None:
    """Compile side by side what this machine has not and FlashInfer did not come with; says so on the log.

    One process of a node does it, while the others wait. Each kernel is built in its own folder, as at a first use:
    FlashInfer's `build_jit_specs` leaves no ninja log there, so a kernel would be built again when it is loaded.
    """
    missing = [spec for spec in specs if not spec.is_compiled]
    if not missing:
        return
    logger.info("FlashInfer compiles %d kernels for this device, once a machine: that takes minutes", len(missing))
    with ThreadPoolExecutor(len(missing)) as builders:
        builds = {spec.name: builders.submit(spec.build, verbose=False) for spec in missing}
    for name, build in builds.items():
        if (error := build.exception()) is not None:
            logger.warning("FlashInfer compiles %s at its first use instead, since this failed: %s", name, error)
