"""Rotary position embeddings, with every RoPE scaling that transformers has for Llama.

How a token is rotated must not depend on how its prompt was cut into chunks or batched. Two scalings, dynamic and
longrope, take their frequencies from the length of the context, so every token has a `context_len` beside its
position: a prompt token the whole prompt's length, a decoded token its position + 1. That is what transformers'
generate does with one sequence and a fresh model; cached keys keep the rotation they were given.

    kind                           frequencies of a token                       tables
    default, linear, yarn, llama3  one set                                      angle of every position
    longrope                       short set up to the original length, then    angle of every position, for
                                   the long set                                 both sets
    dynamic                        one set up to the config's length, then one  frequencies of every context length
                                   per length

Everything is looked up or computed on the device, without waiting for it, so all kinds can be captured in a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from seesaw_ds.errors import UserError
from seesaw_ds.model.ops.interface import TokenPlaces
from seesaw_ds.shapes import ModelShape


class RotaryTables:
    """Cosines and sines by position, for the rotary embedding of one model.

    Args:
        hf_config: a transformers config with one set of `rope_parameters`.
        device: where the tables are and the positions will be.
        dtype: of the cosines and sines; computed in float32 and rounded, as transformers does.
        max_model_len: the longest sequence in tokens; None takes the config's max_position_embeddings. Positions and
            context lengths beyond it are out of the tables' range.

    Raises:
        UserError: the config names a RoPE kind that transformers' Llama does not have, or rotates part of a head.
    """

    def __init__(
        self, hf_config: Any, device: torch.device | str, dtype: torch.dtype, max_model_len: int | None = None
    ) -> None:
        self.head_dim: int = hf_config.head_dim
        self.dtype = dtype
        self.max_model_len: int = max_model_len or hf_config.max_position_embeddings
        rope_type = _rope_type(hf_config)
        inv_freq, self._attention_scaling = _frequencies(hf_config, rope_type, None)
        if 2 * inv_freq.numel() != self.head_dim:
            raise UserError(
                f"head_dim={self.head_dim}: RoPE must rotate whole heads, but the config's rope_parameters give "
                f"{inv_freq.numel()} frequencies; remove partial_rotary_factor"
            )

        # Contexts longer than this leave the first set of frequencies.
        self._first_set_len = self.max_model_len
        self._frequency_sets: Tensor | None = None
        if rope_type == "dynamic":
            self._first_set_len = hf_config.max_position_embeddings
            sets = [inv_freq]
            for length in range(self._first_set_len + 1, self.max_model_len + 1):
                sets.append(_frequencies(hf_config, rope_type, length)[0])
            self._frequency_sets = torch.stack(sets).to(device)
            return
        sets = [inv_freq]
        if rope_type == "longrope":
            self._first_set_len = hf_config.rope_parameters["original_max_position_embeddings"]
            sets.append(_frequencies(hf_config, rope_type, self._first_set_len + 1)[0])
        angles = torch.cat([torch.arange(self.max_model_len).float()[:, None] * frequencies for frequencies in sets])
        self._cos = (angles.cos() * self._attention_scaling).to(device, dtype)
        self._sin = (angles.sin() * self._attention_scaling).to(device, dtype)

    def cos_sin(self, positions: Tensor, context_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of N tokens, each [N, head_dim] of the tables' dtype, the two halves alike.

        Args:
            positions: [N] int64, from 0.
            context_lens: [N] int64, as the module's text says; the kinds with one set of frequencies ignore it.
        """
        if self._frequency_sets is not None:
            set_index = (context_lens - self._first_set_len).clamp(min=0)
            angles = positions[:, None].float() * self._frequency_sets[set_index]
            cos = (angles.cos() * self._attention_scaling).to(self.dtype)
            sin = (angles.sin() * self._attention_scaling).to(self.dtype)
        else:
            rows = positions + (context_lens > self._first_set_len) * self.max_model_len
            cos, sin = self._cos[rows], self._sin[rows]
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    @staticmethod
    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` [N, heads, head_dim] by `cos` and `sin` [N, head_dim], in the dtype of `x`.

        Dimension i is paired with i + head_dim / 2, as Hugging Face checkpoints have it.
        """
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return x * cos[:, None].to(x.dtype) + rotated * sin[:, None].to(x.dtype)


class ModelRotation:
    """The rotary tables of a model: one for each of the shape's attention kinds, shared where they are the same.

    Args:
        config: the model folder's config.json.
        shape: what it says.
        device, max_model_len: as for `RotaryTables`; angles are float32.
    """

    def __init__(
        self, config: Mapping[str, Any], shape: ModelShape, device: torch.device, max_model_len: int | None = None
    ) -> None:
        hf_config = CONFIG_MAPPING[shape.family.model_type](**config)
        hf_config.head_dim = shape.head_dim
        tables: dict[str | None, RotaryTables] = {}
        for kind in shape.attention_kinds:
            if kind.rope not in tables:
                one = copy.copy(hf_config)
                one.rope_parameters = hf_config.rope_parameters[kind.rope] if kind.rope else hf_config.rope_parameters
                tables[kind.rope] = RotaryTables(one, device, torch.float32, max_model_len)
        self._tables = tables
        self._ropes = [kind.rope for kind in shape.attention_kinds]

    def places(
        self, positions: Tensor, context_lens: Tensor, write_blocks: Tensor, write_offsets: Tensor
    ) -> tuple[TokenPlaces, ...]:
        """Where N tokens stand, for each attention kind; all arguments (N,) int64."""
        angles = {rope: table.cos_sin(positions, context_lens) for rope, table in self._tables.items()}
        return tuple(TokenPlaces(*angles[rope], write_blocks, write_offsets) for rope in self._ropes)


def _rope_type(hf_config: Any) -> str:
    rope_type: str = hf_config.rope_parameters["rope_type"]
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if rope_type not in kinds:
        raise UserError(f"rope_type={rope_type!r}: must be one of {', '.join(kinds)}")
    return rope_type


def _frequencies(hf_config: Any, rope_type: str, context_len: int | None) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 on the CPU, and the factor on cosines and sines.

    `context_len` None gives the set that a model starts with.
    """
    if rope_type == "default":
        exponents = torch.arange(0, hf_config.head_dim, 2).float() / hf_config.head_dim
        return 1.0 / hf_config.rope_parameters["rope_theta"] ** exponents, 1.0
    # A tensor, for transformers passes one: with an int the rounding of the base differs.
    seq_len = None if context_len is None else torch.tensor(context_len)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"), seq_len=seq_len)
    return inv_freq, scaling
