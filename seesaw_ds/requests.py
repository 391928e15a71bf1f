"""What a user asks for and what comes back: sampling parameters, requests, sequences, results."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(str, enum.Enum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names and meanings are vLLM's; `seesaw_ds.batch.sampling` checks ranges.

    `temperature` 0 is greedy. `top_k` 0 (or -1) and `top_p` 1 keep every token. `logprobs` is how many top
    tokens to report beside the chosen one (None: report nothing). `seed` None takes one derived from the run's seed
    and the request's id, so a run repeats itself.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @property
    def needs_token_history(self) -> bool:
        """Whether choosing a token depends on the tokens before it (penalties)."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position: the chosen token's, and the most likely tokens', best first."""

    token_logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. A request with n > 1 becomes n of these.

    `seq_id` is unique in a run and rises in the order of arrival. `seed` is final: the request's own or derived,
    already different for each of the n. `stop_token_ids` holds the end-of-sequence tokens too, unless the
    request ignores them.
    """

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """A finished sequence: its output tokens (a stop token is the last one) and why it ended."""

    seq_id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
