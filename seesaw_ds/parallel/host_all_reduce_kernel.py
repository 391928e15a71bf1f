"""The Triton kernel of `HostStagedAllReduce`: write to host memory, raise a flag, wait for the peers', read, add.

A tensor is cut into chunks. Half of the blocks write chunks, the other half read them, so that both directions of the
host link carry data at once. Chunk c is written by block c mod W of each rank and read by block W + c mod W:

    rank 0   writer c mod W:  slot 0 <- x 0, flag (0, c) <- n      reader: flag (1, c) >= n?  x 0 + slot 1 -> result 0
    rank 1   writer c mod W:  slot 1 <- x 1, flag (1, c) <- n      reader: flag (0, c) >= n?  slot 0 + x 1 -> result 1

n counts the calls, 1 at the first. It is kept on each device, once for every block, and each block adds to its own: a
replayed CUDA graph goes on counting. All ranks make the same calls in the same order, so they agree on n.

Nothing is overwritten while it is read. Call n uses half n mod 2 of every slot, so the first to write where a rank's
call n wrote is its call n + 2. That starts when the rank's call n + 1 has ended, which has seen a flag of every peer at
n + 1 or more. A peer raises that flag in its own call n + 1, which starts when its call n, reads and all, has ended.
One half would not do: a flag at n says that the peer has written in call n, not that it has read. A flag may be at
n + 1 when a reader waits for n; the data of call n is then still there, in the other half, hence the >=.

Writers wait for no other rank, so flags rise whenever a rank runs, however late, and readers of every rank come to an
end. Writers have the lower block numbers and are given their multiprocessors first.

A flag may rise when its block's stores have arrived. The link takes all blocks' stores in the order in which they are
made; if all begin at once, all arrive at the end, and reading begins when writing is over. So writers begin in waves: a
block waits until those of the waves before it, on its own device, have made their stores::

    link out   wave 0 | wave 1 | wave 2 | wave 3
    link in             wave 0 | wave 1 | wave 2 | wave 3

On two H200 with P2P off (34 GB/s each way) 576 KiB take 26 us, 17 of them the link's. Only when writers begin
hangs on this.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# "num_vectors" changes with the batch: one compiled kernel serves all.
@triton.jit(do_not_specialize=["num_vectors"])
def reduce_through_host(
    x,
    result,
    slots,
    flags,
    calls,
    num_begun,
    num_vectors,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    SLOT_VECTORS: tl.constexpr,
    NUM_FLAGS: tl.constexpr,
    FLAG_STRIDE: tl.constexpr,
    CHUNK_VECTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    WAVE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Every tensor is counted in vectors of VECTOR elements, 16 bytes.

    x, result   device, `num_vectors`; the result is x summed over the ranks
    slots       host, (NUM_RANKS, 2 halves, SLOT_VECTORS), of x's type
    flags       host, int64 (NUM_RANKS, NUM_FLAGS, FLAG_STRIDE), the first of each FLAG_STRIDE is used
    calls       device, int64, one for each block of the grid, which is even and the same in every call
    num_begun   device, int64: how many writers have made their first stores, over all calls

    WAVE        writers in a wave; 0 has all begin at once
    IS_EARLY    this kernel may start while those before it run, and the next one while it does
    """
    if IS_EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    num_writers = tl.num_programs(0) // 2
    num_chunks = tl.cdiv(num_vectors, CHUNK_VECTORS)
    call = tl.load(calls + block) + 1
    tl.debug_barrier()  # every thread has read the count before one of them raises it
    half = call % 2
    if block < num_writers:
        slot = slots + (RANK * 2 + half) * (SLOT_VECTORS * VECTOR)
        if WAVE > 0:
            if block >= WAVE:
                _wait_until(num_begun, (call - 1) * num_writers + block // WAVE * WAVE)
            tl.debug_barrier()
        for chunk in range(block, num_chunks, num_writers):
            offsets, is_inside = _elements(chunk, num_vectors, CHUNK_VECTORS, VECTOR)
            tl.store(slot + offsets, tl.load(x + offsets, mask=is_inside), mask=is_inside)
            if chunk < num_writers:
                _count(num_begun)
            _raise_flag(flags + (RANK * NUM_FLAGS + chunk) * FLAG_STRIDE, call)
        if block >= num_chunks:
            _count(num_begun)
    else:
        for chunk in range(block - num_writers, num_chunks, num_writers):
            for peer in tl.static_range(NUM_RANKS):
                if peer != RANK:
                    _wait_until(flags + (peer * NUM_FLAGS + chunk) * FLAG_STRIDE, call)
            tl.debug_barrier()  # what the waiting thread acquired is now visible to all
            offsets, is_inside = _elements(chunk, num_vectors, CHUNK_VECTORS, VECTOR)
            total = _share(x, slots, 0, half, offsets, is_inside, RANK, SLOT_VECTORS * VECTOR)
            for peer in tl.static_range(1, NUM_RANKS):
                total += _share(x, slots, peer, half, offsets, is_inside, RANK, SLOT_VECTORS * VECTOR)
            tl.store(result + offsets, total.to(result.dtype.element_ty), mask=is_inside)
    tl.store(calls + block, call)


@triton.jit
def _elements(chunk, num_vectors, CHUNK_VECTORS: tl.constexpr, VECTOR: tl.constexpr):
    """The chunk's elements, (CHUNK_VECTORS, VECTOR), and which of its vectors are inside the tensor."""
    vectors = (chunk * CHUNK_VECTORS + tl.arange(0, CHUNK_VECTORS))[:, None]
    return vectors * VECTOR + tl.arange(0, VECTOR)[None, :], vectors < num_vectors


@triton.jit
def _share(x, slots, rank: tl.constexpr, half, offsets, is_inside, RANK: tl.constexpr, SLOT_SIZE: tl.constexpr):
    """One rank's part of the sum in float32. Volatile loads pass by the caches: slots change behind their back."""
    if rank == RANK:
        part = tl.load(x + offsets, mask=is_inside)
    else:
        part = tl.load(slots + (rank * 2 + half) * SLOT_SIZE + offsets, mask=is_inside, volatile=True)
    return part.to(tl.float32)


@triton.jit
def _raise_flag(flag, call):
    """Say to all devices that what this block has stored so far is there."""
    tl.debug_barrier()  # all threads' stores come before the one release, which is cumulative
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %is_first;
            .reg .u32 %thread;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %is_first, %thread, 0;
            @%is_first st.release.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,l",
        [flag.to(tl.int64), call],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _count(counter):
    """Add one for this block, whose stores have been made."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")


@triton.jit
def _wait_until(counter, least):
    """Hold the first thread until the counter has reached `least`; a barrier must follow."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %is_other, %is_behind;
            .reg .u32 %thread;
            .reg .u64 %seen;
            mov.u32 %thread, %tid.x;
            setp.ne.u32 %is_other, %thread, 0;
            @%is_other bra DONE;
        AGAIN:
            ld.acquire.sys.global.u64 %seen, [$1];
            setp.lt.u64 %is_behind, %seen, $2;
            @%is_behind bra AGAIN;
        DONE:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,l",
        [counter.to(tl.int64), least],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
