"""Which tensors a checkpoint in Hugging Face form has, and where in them a layer's projections are. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from seesaw_ds.shapes import ModelShape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class Projection(NamedTuple):
    """Where a projection's (rows, columns) weight is: from `first_row` of a tensor that it may share with others."""

    tensor: str
    first_row: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Replicated:
    """A small tensor that every rank keeps whole: its shape, and the checkpoint's tensors that make it up."""

    shape: tuple[int, ...]
    tensors: Mapping[str, tuple[int, ...]]


def projections(shape: ModelShape, layer: int) -> dict[str, Projection]:
    """A layer's "q", "k", "v", "o", and "gate.<e>", "up.<e>", "down.<e>" of each expert e; a plain FFN is expert 0."""
    family = shape.family
    prefix = f"model.layers.{layer}."
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found = _stacked(prefix, family.qkv, {"q": q_rows, "k": kv_rows, "v": kv_rows}, hidden)
    found["o"] = Projection(f"{prefix}self_attn.o_proj.weight", 0, hidden, q_rows)
    for expert in range(max(1, shape.num_experts)):
        inside = prefix if family.experts is None else f"{prefix}{family.experts}.{expert}."
        found |= _stacked(inside, family.gate_up, {f"gate.{expert}": ffn, f"up.{expert}": ffn}, hidden)
        found[f"down.{expert}"] = Projection(f"{inside}{family.down}.weight", 0, hidden, ffn)
    return found


def _stacked(prefix: str, modules: tuple[str, ...], rows: dict[str, int], columns: int) -> dict[str, Projection]:
    """Projections with a tensor each, or in one tensor one after another."""
    found = {}
    first_row = 0
    for index, (name, size) in enumerate(rows.items()):
        is_shared = len(modules) == 1
        tensor = f"{prefix}{modules[0 if is_shared else index]}.weight"
        found[name] = Projection(tensor, first_row if is_shared else 0, size, columns)
        first_row += size
    return found


def replicated_tensors(shape: ModelShape) -> dict[str, Replicated]:
    """By name: "final", "<role>.<layer>" of `Family.norms`, "router.<layer>", "qkv_bias.<layer>" by KV head."""
    family = shape.family
    hidden, head_dim = shape.hidden_size, shape.head_dim
    q_size, kv_size = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    sizes = {"query": head_dim, "key": head_dim}
    if family.qk_norm == "projection":
        sizes = {"query": q_size, "key": kv_size}
    found = {"final": Replicated((hidden,), {FINAL_NORM: (hidden,)})}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for role, name in family.norms.items():
            size = (sizes.get(role, hidden),)
            found[f"{role}.{layer}"] = Replicated(size, {f"{prefix}{name}.weight": size})
        if family.has_qkv_bias:
            parts = zip(family.qkv, (q_size, kv_size, kv_size), strict=True)
            biases = {f"{prefix}{name}.bias": (size,) for name, size in parts}
            found[f"qkv_bias.{layer}"] = Replicated((q_size + 2 * kv_size,), biases)
        if shape.num_experts:
            router = (shape.num_experts, hidden)
            found[f"router.{layer}"] = Replicated(router, {f"{prefix}{family.router}.weight": router})
    return found


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_layers):
        for part in projections(shape, layer).values():
            tensors[part.tensor] = (part.first_row + part.rows, part.columns)
    for replicated in replicated_tensors(shape).values():
        tensors |= replicated.tensors
    if not shape.tie_word_embeddings:
        tensors[HEAD] = (shape.vocab_size, shape.hidden_size)
    return tensors
