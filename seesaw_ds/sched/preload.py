"""When weights of the decode layout come early: while the last prompts run, into KV blocks that nobody will need.

At a change of layout the devices wait for the weights. Those that a rank lacks could come while it still computes, but
for the memory: their slots hold what the old layout computes with. Near the end of a run's last prefill phase the KV
pool often has room for them. So when few prompts are left, and all that is left will fit beside it to its full length,
free blocks are lent to as much of the exchange as they hold, until the phase has changed; and more as more become free.
"""

from __future__ import annotations

from seesaw_ds.sched.output import Preload, SchedulerLimits
from seesaw_ds.sched.pools import KvPools
from seesaw_ds.sched.prefill import PrefillQueue
from seesaw_ds.sched.sequence import SequenceState

# Half as long again as an exchange through host memory takes, so that the host keeps up with queueing it: 70B on two
# GPUs 1.0 s, 48 micro-batches of 256 tokens 1.7 s. Decode rows that ride make them more than that.
MICRO_BATCHES_BEFORE = 48


class Preloading:
    """Decides again whenever a prompt has been admitted, and lends the blocks."""

    def __init__(self, limits: SchedulerLimits, pools: KvPools, prefill: PrefillQueue) -> None:
        self._limits = limits
        self._pools = pools
        self._prefill = prefill
        self._num_waiting_last: int | None = None

    def next(self) -> Preload | None:
        """Lend blocks to the exchange, if now is the time."""
        size, prefill, pools = self._limits.preload, self._prefill, self._pools
        if size is None or not prefill.is_input_closed or prefill.num_waiting == self._num_waiting_last:
            return None
        most_blocks = MICRO_BATCHES_BEFORE * self._limits.max_num_batched_tokens // self._limits.block_size
        if prefill.waiting_blocks > most_blocks or not (prefill.num_waiting or prefill.has_chunks_left):
            return None
        self._num_waiting_last = prefill.num_waiting
        num_rounds_left = size.num_rounds - len(pools.lent_blocks) // size.round_blocks
        num_rounds = min(num_rounds_left, self._num_spare_blocks() // size.round_blocks)
        return None if num_rounds <= 0 else Preload(num_rounds, pools.lend(num_rounds * size.round_blocks))

    @property
    def share(self) -> float:
        """How much of the exchange has come, or is on its way."""
        size = self._limits.preload
        return 0.0 if size is None else len(self._pools.lent_blocks) / (size.num_rounds * size.round_blocks)

    def end_phase(self) -> None:
        """The phase has changed: take the blocks back."""
        self._pools.take_back()
        self._num_waiting_last = None

    def _num_spare_blocks(self) -> int:
        """What is left of the GPU pool when all that is left has its full length; none if nothing will decode."""
        owners = [seq for seq in self._pools.owners.values() if seq.state is not SequenceState.ENDED]
        left = [*owners, *self._prefill.waiting()]
        if all(seq.spec.max_tokens == 1 for seq in left):
            return 0
        taken = sum(seq.peak_blocks for seq in left) + len(self._pools.lent_blocks)
        # What those that ended still hold is not free yet.
        return min(self._limits.num_gpu_blocks - taken, self._pools.gpu.num_free)
