"""Where every sequence's KV blocks and slot are: the only code that takes or returns them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from seesaw_ds.sched.blocks import BlockPool, blocks_for
from seesaw_ds.sched.output import Activate, Evict, SchedulerLimits, SwapIn
from seesaw_ds.sched.reserve import Reserve
from seesaw_ds.sched.sequence import Sequence, SequenceState

# States in which a sequence with a slot is a resident.
_RESIDENT = (SequenceState.PREFILLING, SequenceState.SWAPPING_IN, SequenceState.RUNNING)


class KvPools:
    """The two KV pools, the slots, and the sequences that own parts of them, by id in order of admission.

    `admit` makes a sequence an owner; `release` ends it. In between, `retire` takes a sequence that ended out of
    the reserve rule while something in flight still uses its blocks. `slot_holders` are the owners with a slot, by id:
    few, where owners may be many thousands. `residents` are those of them on the GPU to stay, or on their way there.
    `num_transit_blocks` are GPU blocks of prompts that do not stay there, `lent_blocks` those that no sequence has
    because weights do.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.gpu = BlockPool("GPU", limits.num_gpu_blocks)
        self.host = BlockPool("host", limits.num_host_blocks)
        self.slots = BlockPool("slot", limits.max_num_seqs)
        self.reserve = Reserve(limits.num_gpu_blocks + limits.num_host_blocks)
        self.owners: dict[int, Sequence] = {}
        self.slot_holders: dict[int, Sequence] = {}
        self.residents: dict[int, Sequence] = {}
        self.num_transit_blocks = 0
        self.lent_blocks: tuple[int, ...] = ()

    def admit(self, seq: Sequence, stays: bool) -> None:
        """Give the prompt its GPU blocks; with them a slot when it stays, or host blocks when it goes on to decode."""
        num_blocks = seq.prompt_blocks
        seq.stays = stays
        seq.gpu_blocks = list(self.gpu.allocate(num_blocks))
        if stays:
            self._take_slot(seq)
        else:
            self.num_transit_blocks += num_blocks
            if seq.goes_to_host:
                seq.host_blocks = self.host.allocate(num_blocks)
        self.reserve.add(seq.seq_id, num_blocks, seq.peak_blocks)
        self.owners[seq.seq_id] = seq

    def activate(self, seq: Sequence) -> Activate:
        """What the workers need to know of a sequence whose prompt stayed."""
        assert seq.slot is not None
        return Activate(seq.seq_id, seq.slot, seq.spec.num_prompt_tokens, tuple(seq.gpu_blocks))

    def finish_swap_out(self, seq: Sequence) -> None:
        """Return the prompt's GPU blocks: its KV is on the host."""
        self._end_transit(seq)
        self.gpu.free(seq.gpu_blocks)
        seq.gpu_blocks = []
        seq.is_swapped_out = True

    def start_swap_in(self, seq: Sequence) -> SwapIn:
        """Take a slot and as many GPU blocks as the sequence has on the host; it holds both until the copy is done."""
        assert len(seq.host_blocks) == blocks_for(seq.num_stored_tokens, seq.block_size)
        seq.gpu_blocks = list(self.gpu.allocate(len(seq.host_blocks)))
        slot = self._take_slot(seq)
        return SwapIn(seq.seq_id, slot, seq.num_stored_tokens, seq.host_blocks, tuple(seq.gpu_blocks))

    def finish_swap_in(self, seq: Sequence) -> None:
        """Return the host blocks: the KV is on the GPU."""
        self.host.free(seq.host_blocks)
        seq.host_blocks = ()

    def start_evict(self, seq: Sequence) -> Evict:
        """Take host blocks for a sequence with no step in flight; it keeps its slot until the copy is done."""
        assert seq.slot is not None
        assert len(seq.gpu_blocks) == blocks_for(seq.num_stored_tokens, seq.block_size)
        seq.host_blocks = self.host.allocate(len(seq.gpu_blocks))
        del self.residents[seq.seq_id]
        return Evict(seq.seq_id, seq.slot, tuple(seq.gpu_blocks), seq.host_blocks)

    def finish_evict(self, seq: Sequence) -> None:
        """Return the GPU blocks and the slot: the KV is on the host."""
        self.gpu.free(seq.gpu_blocks)
        seq.gpu_blocks = []
        self._return_slot(seq)

    def grow(self, seq: Sequence) -> tuple[int, ...]:
        """Append one GPU block to the sequence's table; returns it."""
        self.reserve.grow(seq.seq_id)
        new_blocks = self.gpu.allocate(1)
        seq.gpu_blocks.extend(new_blocks)
        return new_blocks

    def lend(self, num_blocks: int) -> tuple[int, ...]:
        """Give GPU blocks to something else for a while. All sequences, to their full length, must fit beside them."""
        blocks = self.gpu.allocate(num_blocks)
        self.lent_blocks += blocks
        return blocks

    def take_back(self) -> None:
        """Return the blocks that were lent."""
        self.gpu.free(self.lent_blocks)
        self.lent_blocks = ()

    def retire(self, seq: Sequence) -> None:
        """Count the blocks of a sequence that ended as free in the reserve rule."""
        self.reserve.remove(seq.seq_id)
        self.residents.pop(seq.seq_id, None)

    def release(self, seq: Sequence) -> None:
        """Return everything that a retired sequence still owns."""
        assert seq.in_flight == 0
        self._end_transit(seq)
        self.host.free(seq.host_blocks)
        self.gpu.free(seq.gpu_blocks)
        if seq.slot is not None:
            self._return_slot(seq)
        del self.owners[seq.seq_id]

    def _take_slot(self, seq: Sequence) -> int:
        (slot,) = self.slots.allocate(1)
        seq.slot = slot
        self.slot_holders[seq.seq_id] = seq
        self.residents[seq.seq_id] = seq
        return slot

    def _return_slot(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self.slots.free((seq.slot,))
        seq.slot = None
        del self.slot_holders[seq.seq_id]

    def _end_transit(self, seq: Sequence) -> None:
        if not seq.stays and not seq.is_swapped_out:
            self.num_transit_blocks -= seq.prompt_blocks

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each used block and slot has exactly one owner and the reserve rule is kept."""
        self._check_owned(self.host, lambda seq: seq.host_blocks)
        self._check_owned(self.gpu, lambda seq: seq.gpu_blocks, self.lent_blocks)
        self._check_owned(self.slots, lambda seq: () if seq.slot is None else (seq.slot,))
        if any(seq.slot is None for seq in self.slot_holders.values()) or len(self.slot_holders) != self.slots.num_used:
            raise RuntimeError(f"slot pool: {self.slots.num_used} used != {len(self.slot_holders)} listed holders")
        staying = {seq_id for seq_id, seq in self.slot_holders.items() if seq.state in _RESIDENT}
        if staying != self.residents.keys():
            raise RuntimeError(f"slot pool: {sorted(staying)} stay on the GPU != {sorted(self.residents)} listed")
        transit = sum(seq.prompt_blocks for seq in self.owners.values() if not seq.stays and not seq.is_swapped_out)
        if transit != self.num_transit_blocks:
            raise RuntimeError(f"GPU pool: {transit} blocks in transit != counted {self.num_transit_blocks}")
        self.reserve.check_integrity()

    def _check_owned(
        self, pool: BlockPool, blocks_of: Callable[[Sequence], Collection[int]], others: Collection[int] = ()
    ) -> None:
        pool.check_integrity()
        owned = [*others, *(block_id for seq in self.owners.values() for block_id in blocks_of(seq))]
        if not len(owned) == len(set(owned)) == pool.num_used:
            raise RuntimeError(
                f"{pool.name} pool: {len(owned)} owned or lent ({len(set(owned))} different) != {pool.num_used} used"
            )
