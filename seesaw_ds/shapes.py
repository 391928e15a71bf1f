"""The sizes of a decoder-only model, read from a Hugging Face ``config.json``; pure arithmetic on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seesaw_ds.errors import UserError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and switches of a Llama-family decoder. `num_heads` are query heads, `dtype` is the checkpoint's."""

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

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer's matrices (norms are negligible and kept whole on every rank)."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * self.intermediate_size * self.hidden_size

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
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        known = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UserError(f"architectures={architectures}: not supported; supported: {known}")
    for switch in ("attention_bias", "mlp_bias"):
        if config.get(switch):
            raise UserError(f"{switch}=true in config.json: not supported for {architectures[0]}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"hidden_act={config['hidden_act']!r} in config.json: not supported for {architectures[0]}; only silu"
        )
    try:
        num_heads = int(config["num_attention_heads"])
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UserError(
                f"num_attention_heads={num_heads} in config.json: must be a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        hidden_size = int(config["hidden_size"])
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        shape = ModelShape(
            architecture=architectures[0],
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=_longest_position(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=str(dtype),
        )
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: a size is not a number ({error})") from None
    if shape.dtype not in DTYPE_BYTES:
        raise UserError(
            f"dtype={shape.dtype!r} in config.json: must be one of {', '.join(DTYPE_BYTES)}; set dtype in the config"
        )
    return shape
