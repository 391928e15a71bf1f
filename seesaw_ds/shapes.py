"""The sizes of a decoder-only model, read from a Hugging Face ``config.json``; pure arithmetic on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seesaw_ds.errors import UserError
from seesaw_ds.model.families import FAMILIES
from seesaw_ds.model.families.family import AttentionKind, Family

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and switches of a decoder. `num_heads` are query heads, `dtype` is the checkpoint's.

    intermediate_size   of an FFN; with `num_experts`, of each expert
    attention           how each layer attends; () is all alike, without a window
    attention_scale     on attention scores; None is head_dim ** -0.5
    *_soft_cap          c: scores or logits become ``c * tanh(x / c)``
    embedding_scale, residual_scale, logit_scale    on embeddings, on each attention's and FFN's output, on logits
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str
    attention: tuple[AttentionKind, ...] = ()
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    has_normalized_experts: bool = True

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The different ways in which layers attend."""
        return tuple(dict.fromkeys(self.attention)) or (AttentionKind(),)

    def layer_kind(self, layer: int) -> int:
        """Which of `attention_kinds` is that of `layer`."""
        return self.attention_kinds.index(self.attention[layer]) if self.attention else 0

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer's matrices (norms are negligible and kept whole on every rank)."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * max(1, self.num_experts) * self.intermediate_size * self.hidden_size

    @property
    def pairs_per_token(self) -> int:
        """The context length at which a token's attention costs as much as its linear layers."""
        return max(1, self.layer_parameters // (2 * self.num_heads * self.head_dim))

    def kv_block_bytes(self, num_layers: int, num_kv_heads: int, block_size: int, dtype: str) -> int:
        """Bytes of one KV block of `block_size` tokens for that many layers and heads."""
        return num_layers * 2 * num_kv_heads * block_size * self.head_dim * DTYPE_BYTES[dtype]


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The model folder's ``config.json``. Raises UserError when it is absent or not JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"model={str(folder)!r}: no config.json there; model must be a folder in Hugging Face format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"model={str(folder)!r}: config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"model={str(folder)!r}: config.json must hold a JSON object")
    return config


def _longest_position(config: Mapping[str, Any]) -> int:
    """Positions the model can take: RoPE kinds that stretch ("dynamic", "linear") take `factor` times more."""
    limit = int(config.get("max_position_embeddings", 2048))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "linear"):
        limit = int(limit * float(rope.get("factor", 1.0)))
    return limit


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Sizes from a Hugging Face config. Raises UserError for an architecture or switch that is not supported."""
    architectures = config.get("architectures") or ["(none)"]
    if architectures[0] not in FAMILIES:
        raise UserError(f"architectures={architectures}: not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[architectures[0]]
    config = {**family.defaults, **config}
    _check_switches(config, family)
    try:
        shape = ModelShape(architecture=family.architecture, **(_sizes(config) | family.switches(config)))
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: a size is not a number ({error})") from None
    if shape.attention and len(shape.attention) != shape.num_layers:
        raise UserError(
            f"layer_types in config.json: has {len(shape.attention)} entries; num_hidden_layers={shape.num_layers}"
        )
    if shape.dtype not in DTYPE_BYTES:
        raise UserError(
            f"dtype={shape.dtype!r} in config.json: must be one of {', '.join(DTYPE_BYTES)}; set dtype in the config"
        )
    return shape


def _check_switches(config: Mapping[str, Any], family: Family) -> None:
    """Raises UserError that names a switch whose value this family does not have here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values = {**config, "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))}
    for switch, supported in {**family.only, "partial_rotary_factor": 1.0}.items():
        value = values.get(switch)
        if value is None or value == supported:
            continue
        text = repr(value) if isinstance(value, str) else json.dumps(value)
        raise UserError(
            f"{switch}={text} in config.json: not supported for {family.architecture}; "
            f"only {supported if isinstance(supported, str) else json.dumps(supported)}"
        )


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every family has. Raises KeyError for a missing one, TypeError or ValueError for no number."""
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UserError(
            f"num_attention_heads={num_heads} in config.json: must be a multiple of num_key_value_heads={num_kv_heads}"
        )
    hidden_size = int(config["hidden_size"])
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": int(config.get("head_dim") or hidden_size // num_heads),
        "intermediate_size": int(config["intermediate_size"]),
        "vocab_size": int(config["vocab_size"]),
        "max_position_embeddings": _longest_position(config),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    }
