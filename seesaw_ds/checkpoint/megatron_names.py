"""Where Megatron-core's GPTModel keeps each weight in a distributed checkpoint. Nothing here imports torch."""

from __future__ import annotations

from typing import NamedTuple

from seesaw_ds.checkpoint.parts import WHOLE, Share, Weight, units_of
from seesaw_ds.errors import UserError
from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.shapes import ModelShape

LAYERS = "decoder.layers."
STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""The modules of a layer for which Megatron-core asks for an extra state; it is empty."""

NAMES: dict[str, tuple[str, Share]] = {
    "qkv": ("self_attention.linear_qkv.weight", WHOLE),
    "qkv_bias": ("self_attention.linear_qkv.bias", WHOLE),
    "o": ("self_attention.linear_proj.weight", WHOLE),
    "query": ("self_attention.q_layernorm.weight", WHOLE),
    "key": ("self_attention.k_layernorm.weight", WHOLE),
    "gate.0": ("mlp.linear_fc1.weight", Share(0, 2)),
    "up.0": ("mlp.linear_fc1.weight", Share(1, 2)),
    "down.0": ("mlp.linear_fc2.weight", WHOLE),
    "before_attention": ("self_attention.linear_qkv.layer_norm_weight", WHOLE),
    "before_ffn": ("mlp.linear_fc1.layer_norm_weight", WHOLE),
    "embedding": ("embedding.word_embeddings.weight", WHOLE),
    "final": ("decoder.final_layernorm.weight", WHOLE),
    "head": ("output_layer.weight", WHOLE),
}
"""Kind of weight -> the global tensor that holds it (without ``decoder.layers.``), and in which share of its rows."""


class Region(NamedTuple):
    """A box of a global tensor: `ranges` has one per dim."""

    key: str
    ranges: tuple[Range, ...]


def region_of(weight: Weight, num_layers: int, stacked: bool) -> tuple[Region, tuple[int, ...]]:
    """Where `weight` lies in its global tensor, and that tensor's shape.

    With `stacked` the layers are dim 0 of one tensor; else every layer has a tensor of its own.
    """
    name, share = NAMES[weight.kind]
    rows = split_evenly(weight.size[0] * share.of, share.of)[share.nth]
    ranges = (rows, *(Range(0, size) for size in weight.size[1:]))
    size = (weight.size[0] * share.of, *weight.size[1:])
    if weight.layer is None:
        return Region(name, ranges), size
    if not stacked:
        return Region(f"{LAYERS}{weight.layer}.{name}", ranges), size
    return Region(LAYERS + name, (Range(weight.layer, weight.layer + 1), *ranges)), (num_layers, *size)


def check_names(shape: ModelShape) -> None:
    """Raises UserError when the model has weights that have no name here."""
    if {weight.kind for unit in units_of(shape) for weight in unit.weights} - NAMES.keys():
        raise UserError(
            f"architectures={shape.architecture!r}: has weights whose Megatron-core names are not known here; "
            "plain decoders (such as Llama and Qwen2) are converted to and from megatron, all between hf and cells"
        )
