"""Megatron-core's tensor-parallel layers, used for inference with weights that live elsewhere.

The layers are built without memory (on the meta device), then `bind` gives them views into the weight arenas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn
from torch.distributed import ProcessGroup

from seesaw_ds.parallel.all_reduce import AllReduce

# (x, weight, bias or None) to x @ weight.T + bias
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# (x, weight, all-reduce) to the sum over ranks of x @ weight.T
ReducedLinear = Callable[[torch.Tensor, torch.Tensor, AllReduce], torch.Tensor]


def _config(group: ProcessGroup, dtype: torch.dtype) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        async_tensor_model_parallel_allreduce=False,
    )


def _no_init(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """``y_local = x @ W_local.T + bias``, if any: the output dim is split over the group and stays split."""

    def __init__(
        self, input_size: int, output_size: int, group: ProcessGroup, linear: Linear, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                input_size,
                output_size,
                config=_config(group, dtype),
                init_method=_no_init,
                bias=False,
                gather_output=False,
                tp_group=group,
            )
        self._linear = linear

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Megatron's own, which prepares for training, takes some 8 us more of the host's time.
        return self._linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """``y = sum over ranks of x_local @ W_local.T``: the input dim is split, the output is all-reduced."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        group: ProcessGroup,
        linear: ReducedLinear,
        all_reduce: AllReduce,
        dtype: torch.dtype,
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                input_size,
                output_size,
                config=_config(group, dtype),
                init_method=_no_init,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=group,
            )
        self._linear = linear
        self._all_reduce = all_reduce

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._linear(input_, self.weight, self._all_reduce), None


class VocabEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Token embedding with the vocabulary split over the group."""

    def __init__(self, vocab_size: int, hidden_size: int, group: ProcessGroup, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(
                vocab_size, hidden_size, init_method=_no_init, config=_config(group, dtype), tp_group=group
            )


def bind(layer: ColumnLinear | RowLinear | VocabEmbedding, weight: torch.Tensor) -> None:
    """Make `weight` the layer's parameter; shape and dtype must be those the layer was built for."""
    expected: torch.Tensor = layer.weight
    if weight.shape != expected.shape or weight.dtype != expected.dtype:
        raise RuntimeError(
            f"{type(layer).__name__}.weight: bound to {tuple(weight.shape)} {weight.dtype}, "
            f"built for {tuple(expected.shape)} {expected.dtype}"
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)


def padded_vocab_size(vocab_size: int, num_cells: int) -> int:
    """The vocabulary rounded up so that its tables can be cut into `num_cells`, a multiple of both phases' TP sizes."""
    return -(-vocab_size // num_cells) * num_cells
