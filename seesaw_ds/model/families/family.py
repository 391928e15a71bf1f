"""What a model family declares: names in its checkpoints, and where it differs from Llama. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from seesaw_ds.errors import UserError

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How a layer attends.

    `window`: a token sees that many, itself included; None is all before it. `rope` is the layer's key in a config
    that has several sets of rotary parameters.
    """

    window: int | None = None
    rope: str | None = None


def no_switches(config: Mapping[str, Any]) -> dict[str, Any]:
    """For families whose sizes say all."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Names are those of a layer's modules in the checkpoint, without ``model.layers.N.``.

    architecture    the config's ``architectures`` entry
    model_type      transformers' name of the config class
    norms           role -> name. Roles: "before_attention" and "before_ffn" norm what enters; "after_attention" and
                    "after_ffn" what is added to the residual stream; "query" and "key" are given when `qk_norm` is
    qk_norm         over each head, or over the whole projection, all ranks' heads together
    norm_adds_one   norms multiply by 1 + weight
    qkv, gate_up    the projections' names; a single one holds their rows one after another
    has_qkv_bias    whether q, k and v have biases
    experts         None, or the folder of numbered experts whose `gate_up` and `down` are inside; `router` beside it
    defaults        config values that are not Llama's when absent
    only            config values that must be these, when present
    switches        config -> fields of ModelShape that differ from their defaults
    """

    architecture: str
    model_type: str
    norms: Mapping[str, str] = field(
        default_factory=lambda: {"before_attention": "input_layernorm", "before_ffn": "post_attention_layernorm"}
    )
    qk_norm: Literal["head", "projection"] | None = None
    norm_adds_one: bool = False
    activation: Activation = "silu"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    has_qkv_bias: bool = False
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    experts: str | None = None
    router: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    switches: Callable[[Mapping[str, Any]], dict[str, Any]] = no_switches


def same_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer has the config's ``sliding_window``, or none has."""
    kind = AttentionKind(window=config.get("sliding_window"))
    return {"attention": (kind,) * config["num_hidden_layers"]}


def windows_by_layer_type(
    config: Mapping[str, Any], layer_types: Sequence[str], *, has_ropes: bool = False
) -> dict[str, Any]:
    """The config's ``sliding_window`` in layers of type "sliding_attention", in its ``layer_types`` or else these.

    `has_ropes`: the rotary parameters have a set for each type. Raises UserError for a type of another name.
    """
    windows = {"sliding_attention": config.get("sliding_window"), "full_attention": None}
    layer_types = config.get("layer_types") or layer_types
    unknown = set(layer_types) - set(windows)
    if unknown:
        raise UserError(f"layer_types={sorted(unknown)} in config.json: not supported; only {', '.join(windows)}")
    return {"attention": tuple(AttentionKind(windows[name], name if has_ropes else None) for name in layer_types)}


def windows_in_late_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's switch: with ``use_sliding_window``, layers from ``max_window_layers`` on have the window."""
    if not config.get("use_sliding_window"):
        return {}
    first = config.get("max_window_layers", 28)
    layers = range(config["num_hidden_layers"])
    return windows_by_layer_type(config, ["full_attention" if i < first else "sliding_attention" for i in layers])
