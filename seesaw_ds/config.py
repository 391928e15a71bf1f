"""The settings of a run, as a user writes them, and the rules they must keep.

`RunConfig` is what the YAML file and ``--set`` say, checked for names and types. Nothing that is found out at run time
is written back into it: sizes derived from memory live in `seesaw_ds.plan.memory.PoolSizes`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair
from seesaw_ds.shapes import ModelShape

LOAD_FORMATS = ("auto", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_LAYOUTS = "auto"
ALL_HOST_MEMORY = 1e9
"""A `kv_offloading_size` in GiB that no machine has: the planner chooses the size, within what is free."""
AUTO_MOST = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "kv_offloading_size": ALL_HOST_MEMORY}
"""How much "auto" may take of what a file or command line does not set."""
WEIGHT_RESHARDS = ("exchange", "host")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run of the engine. Sizes in tokens or blocks unless a unit is named.

    model                   folder in Hugging Face format
    load_format             "auto": its safetensors; "dummy": random weights of its config's shape
    dtype                   of weights, activations and KV; "auto" is what the model's config says
    layouts                 "P2->T2" (prefill, decode), "T2" for the same in both phases; "auto" lets the planner choose
    hardware                what "auto" plans for: a name in configs/hardware or a YAML file; None: the device's. With
                            two layouts, what the choice between them goes by while the run decodes; None: no choice
    weight_reshard          "exchange": between devices, in place; "host": from one copy in host memory
    max_model_len           longest prompt plus output
    max_num_seqs            most sequences decoding at once, in each replica; "auto" may take fewer
    max_num_batched_tokens  most tokens in a prefill micro-batch, decode rows that ride in it included; "auto" may take
                            fewer
    mixed_steps             sequences go on decoding during a prefill phase, as rows of its micro-batches
    gpu_memory_utilization  share of device memory for weights, KV and activations
    kv_block_size           tokens in a KV block
    kv_offloading_size      host KV pool in GiB, over all ranks; where it is not set "auto" chooses it
    num_gpu_kv_blocks       device KV pool in blocks; None: what device memory leaves
    num_host_kv_blocks      host KV pool in blocks, in each replica; None: from kv_offloading_size
    expected_output_tokens  mean length of outputs, as a first guess where max_tokens says little; None: max_tokens
    seed                    of the run; requests without a seed derive theirs from it
    input, output           OpenAI batch files: requests in, results out
    timeline                Chrome trace to write; None: no trace
    """

    model: str
    input: str
    output: str
    layouts: str
    hardware: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    weight_reshard: str = "exchange"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    mixed_steps: bool = True
    gpu_memory_utilization: float = 0.9
    kv_block_size: int = 16
    kv_offloading_size: float = 4.0
    num_gpu_kv_blocks: int | None = None
    num_host_kv_blocks: int | None = None
    expected_output_tokens: int | None = None
    seed: int = 0
    timeline: str | None = None

    @property
    def has_auto_layouts(self) -> bool:
        """Whether the layouts are still to be chosen."""
        return self.layouts == AUTO_LAYOUTS

    @property
    def may_stay(self) -> bool:
        """Whether sequences may decode on in the prefill layout: a profile says what that costs, and there are two."""
        return self.hardware is not None and self.mixed_steps and not self.layout_pair.is_static

    @property
    def layout_pair(self) -> LayoutPair:
        return LayoutPair.parse(self.layouts)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Make a `RunConfig` of a YAML mapping. Raises UserError naming the first key that is unknown, missing or wrong."""
    hints = typing.get_type_hints(RunConfig)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"{key}={values[key]!r}: unknown setting; {mend}")
    for field in dataclasses.fields(RunConfig):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(
                f"{field.name}: missing; every run needs it, in the config file or as --set {field.name}=..."
            )
    defaults = AUTO_MOST if values.get("layouts") == AUTO_LAYOUTS else {}
    checked = {key: _typed(key, value, hints[key]) for key, value in {**defaults, **values}.items()}
    run = RunConfig(**checked)
    _check_values(run)
    return run


def _typed(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = next(option for option in options if option is not type(None))
    if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
        raise UserError(f"{name}={value!r}: must be {wanted.__name__}, not {type(value).__name__}")
    return value


def _check_values(run: RunConfig) -> None:
    for name, allowed in (("load_format", LOAD_FORMATS), ("dtype", DTYPES), ("weight_reshard", WEIGHT_RESHARDS)):
        value = getattr(run, name)
        if value not in allowed:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    for name in (
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_block_size",
        "num_gpu_kv_blocks",
        "num_host_kv_blocks",
        "expected_output_tokens",
    ):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if not 0.0 < run.gpu_memory_utilization <= 1.0:
        raise UserError(f"gpu_memory_utilization={run.gpu_memory_utilization}: must be above 0 and at most 1")
    if not 0.0 < run.kv_offloading_size < math.inf:
        raise UserError(f"kv_offloading_size={run.kv_offloading_size}: must be above 0 and finite (GiB)")
    if not -(2**63) <= run.seed < 2**63:
        raise UserError(f"seed={run.seed}: must fit in 64 bits")
    if not run.has_auto_layouts:
        _check_layouts(run)


def _check_layouts(run: RunConfig) -> None:
    try:
        pair = run.layout_pair
    except ValueError as error:
        raise UserError(str(error)) from None
    if run.weight_reshard == "exchange" and not pair.is_nested:
        raise UserError(
            f"layouts={run.layouts!r}: weight_reshard=exchange needs one tensor-parallel size to divide the other "
            f"({pair.prefill.tp} and {pair.decode.tp}); set weight_reshard=host"
        )


def check_fit(run: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Check the settings against the launched ranks and the model. Raises UserError with the rule that is broken."""
    limit = shape.max_position_embeddings
    if run.max_model_len is not None and run.max_model_len > limit:
        raise UserError(f"max_model_len={run.max_model_len}: the model's max_position_embeddings is {limit}")
    if not run.has_auto_layouts:
        _check_layouts_fit(run, shape, world_size)


def _check_layouts_fit(run: RunConfig, shape: ModelShape, world_size: int) -> None:
    pair = run.layout_pair
    if pair.world_size != world_size:
        raise UserError(
            f"layouts={run.layouts!r}: needs {pair.world_size} ranks, but {world_size} were launched; "
            f"start with deepspeed --num_gpus {pair.world_size} (--num_accelerators on a CPU machine) or change layouts"
        )
    for layout in (pair.prefill, pair.decode):
        if layout.pp > shape.num_layers:
            raise UserError(
                f"layouts={run.layouts!r}: {layout.pp} pipeline stages need at least as many layers, "
                f"but num_hidden_layers={shape.num_layers}"
            )
        try:
            layout.stage_layers(shape.num_layers)
        except ValueError as error:
            raise UserError(str(error)) from None
    cells = pair.cells_per_layer
    for name, size in (
        ("num_attention_heads", shape.num_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.intermediate_size),
    ):
        if size % cells:
            raise UserError(
                f"layouts={run.layouts!r}: {name}={size} must be a multiple of {cells}, "
                f"the tensor-parallel size (least common multiple of both phases')"
            )


def max_model_len(run: RunConfig, shape: ModelShape) -> int:
    """The longest prompt plus output in tokens: as set, or what the model allows."""
    return shape.max_position_embeddings if run.max_model_len is None else run.max_model_len


def dtype_name(run: RunConfig, shape: ModelShape) -> str:
    """The dtype of weights, activations and KV: as set, or what the model's config says."""
    return shape.dtype if run.dtype == "auto" else run.dtype
