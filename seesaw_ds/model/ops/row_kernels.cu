// Kernels of a decode step: linear products of up to 96 rows, their sums over ranks through host memory, and the norms
// between them.
//
// A product of so few rows is bound by reading its weights, and what keeps it from the memory's rate is its beginning:
// the launch, the way of the first bytes, and all the kernels before it that leave the memory idle, an all-reduce above
// all. So a product is launched while the kernels before it still run (programmatic dependent launch), fills its ring
// in shared memory with weights, 17 MB over an H200, and only then waits for its input:
//
//     all-reduce   ----------------|
//     norm          (waits)        |--|
//     product        fetch weights    |-- multiply, fetch ------|
//
// For this a kernel of a step lets the next one start as soon as it runs itself, and waits before it reads or writes
// anything that the kernels before it might write or read. One that does neither is right as well: it ends before the
// next one starts.
//
// The product is out (N, F) = x (N, K) times weights (F, K) transposed. By tiles of F and blocks of K it is a list of
// equal units of work. Tiles of which every thread block (CTA) can have as many are its own; the others come before
// them, and are cut into equal parts:
//
//     tile 0: block 0 1 2 3 | tile 1: block 0 1 2 3 | tile 2: block 0 1 2 3
//     CTA 0 ---------->  CTA 1 ----------->  CTA 2 ----------->
//
// The CTA that has the first block of a tile adds up what the others have of it, in their order. They began with it
// before that CTA came to it, so it seldom waits. Tensor cores take weights as the left operand, 64 features at a time,
// and rows as the right one, so that few rows leave little of them unused.

#include <cuda.h>
#include <cuda_fp16.h>

#include "own_kernel.cuh"
#include "row_work.cuh"

namespace {

constexpr int ROW_BYTES = 128;  // of a swizzled row of shared memory: 64 elements
constexpr int ELEMENTS = ROW_BYTES / 2;
constexpr int FEATURES = 64;   // of a tensor core's left operand
constexpr int NUM_GROUPS = 2;  // warpgroups that multiply, each its own features
constexpr int TILE = NUM_GROUPS * FEATURES;
constexpr int GROUP_BYTES = FEATURES * ROW_BYTES;
constexpr int MOST_ROWS = 96;
constexpr int MOST_ROWS_OF_PIECE = 64;  // of what a CTA sums over ranks at once, with 64 features
constexpr int NUM_CONSUMERS = NUM_GROUPS * 128;
constexpr int NUM_THREADS = NUM_CONSUMERS + 32;  // the last warp fetches
constexpr int MAX_STAGES = 6;
// These leave room for the small kernels that run meanwhile.
constexpr int SHARED_BYTES = 200 << 10;
constexpr int MOST_REGISTERS = 112;

// How a product of so many rows, padded, is cut.
template <int NUM_ROWS>
struct Cut {
    static constexpr bool HAS_MANY_ROWS = NUM_ROWS > MOST_ROWS_OF_PIECE;
    static constexpr int HALVES = HAS_MANY_ROWS ? 1 : 2;  // of a block
    static constexpr int BLOCK = HALVES * ELEMENTS;
    static constexpr int NUM_SUMS = NUM_ROWS / 2;  // of a thread
    static constexpr int VECTORS_OF_PART = NUM_SUMS / 4 * NUM_CONSUMERS;
    // The ring in shared memory has a block of weights and of rows a stage.
    static constexpr int WEIGHT_BYTES = NUM_GROUPS * GROUP_BYTES;  // of half a block, or of all of it
    static constexpr int HALF_BYTES = WEIGHT_BYTES + NUM_ROWS * ROW_BYTES;
    static constexpr int STAGE_BYTES = HALVES * HALF_BYTES;
    static constexpr int STAGES_THAT_FIT = SHARED_BYTES / STAGE_BYTES;
    static constexpr int NUM_STAGES = STAGES_THAT_FIT < MAX_STAGES ? STAGES_THAT_FIT : MAX_STAGES;
    static constexpr int RING_BYTES = NUM_STAGES * STAGE_BYTES;
    // Of what is summed over ranks at once: 64 features of all rows, or of half of them.
    static constexpr int PIECES_OF_GROUP = HAS_MANY_ROWS ? 2 : 1;
    static constexpr int ROWS_OF_PIECE = NUM_ROWS / PIECES_OF_GROUP;
    static_assert(ROWS_OF_PIECE % 8 == 0 && ROWS_OF_PIECE <= MOST_ROWS_OF_PIECE);
};

__device__ __forceinline__ void init_barrier(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void expect_bytes(u32 barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const CUtensorMap* map, int inner, int outer, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(inner), "r"(outer), "r"(barrier)
        : "memory");
}

// Of five dimensions; not read again soon.
__device__ __forceinline__ void copy_box_once(u32 to, const CUtensorMap* map, const int (&at)[5], u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(barrier), "l"(READ_ONCE)
        : "memory");
}

__device__ __forceinline__ void sync_group(int group) {
    if (group == 0) {
        asm volatile("bar.sync 2, 128;" ::: "memory");
    } else {
        asm volatile("bar.sync 3, 128;" ::: "memory");
    }
}

// Stores that this thread knows of come before.
__device__ __forceinline__ void count(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Until `counter` is `target`; its later loads see what was stored before the others counted.
__device__ __forceinline__ void wait_until(const int* counter, int target) {
    int seen;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen != target);
}

// A matrix in shared memory as tensor cores want it described: 128-byte swizzle, 1,024 bytes from eight rows to eight.
__device__ __forceinline__ u64 matrix_at(u32 address) {
    return (address & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#ifdef FLOAT16
constexpr bool IS_HALF = true;
#define TYPES "f16.f16"
#else
constexpr bool IS_HALF = false;
#define TYPES "bf16.bf16"
#endif

#define SUMS_4 "%0, %1, %2, %3"
#define SUMS_8 SUMS_4 ", %4, %5, %6, %7"
#define SUMS_12 SUMS_8 ", %8, %9, %10, %11"
#define SUMS_16 SUMS_12 ", %12, %13, %14, %15"
#define SUMS_20 SUMS_16 ", %16, %17, %18, %19"
#define SUMS_24 SUMS_20 ", %20, %21, %22, %23"
#define SUMS_28 SUMS_24 ", %24, %25, %26, %27"
#define SUMS_32 SUMS_28 ", %28, %29, %30, %31"
#define SUMS_40 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SUMS_48 SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define OUT_4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define OUT_8 OUT_4(0), OUT_4(4)
#define OUT_12 OUT_8, OUT_4(8)
#define OUT_16 OUT_12, OUT_4(12)
#define OUT_20 OUT_16, OUT_4(16)
#define OUT_24 OUT_20, OUT_4(20)
#define OUT_28 OUT_24, OUT_4(24)
#define OUT_32 OUT_28, OUT_4(28)
#define OUT_40 OUT_32, OUT_4(32), OUT_4(36)
#define OUT_48 OUT_40, OUT_4(40), OUT_4(44)

// LEFT, RIGHT, TRANSPOSED: the numbers of the operands that follow the sums.
#define MULTIPLY(ROWS, SUMS, OUT, LEFT, RIGHT, TRANSPOSED)                                             \
    if constexpr (NUM_ROWS == ROWS)                                                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #ROWS "k16.f32." TYPES " {" SUMS "}, " LEFT   \
                     ", " RIGHT ", 1, 1, 1, " TRANSPOSED ", 0;"                                        \
                     : OUT                                                                             \
                     : "l"(left), "l"(right), "n"(IS_TRANSPOSED));

// sums += left right: 64 features by 16 elements, and 16 elements by NUM_ROWS rows. Left lies transposed, or not.
template <int NUM_ROWS, int IS_TRANSPOSED>
__device__ __forceinline__ void multiply_add(float* s, u64 left, u64 right) {
    MULTIPLY(8, SUMS_4, OUT_4(0), "%4", "%5", "%6")
    MULTIPLY(16, SUMS_8, OUT_8, "%8", "%9", "%10")
    MULTIPLY(24, SUMS_12, OUT_12, "%12", "%13", "%14")
    MULTIPLY(32, SUMS_16, OUT_16, "%16", "%17", "%18")
    MULTIPLY(40, SUMS_20, OUT_20, "%20", "%21", "%22")
    MULTIPLY(48, SUMS_24, OUT_24, "%24", "%25", "%26")
    MULTIPLY(56, SUMS_28, OUT_28, "%28", "%29", "%30")
    MULTIPLY(64, SUMS_32, OUT_32, "%32", "%33", "%34")
    MULTIPLY(80, SUMS_40, OUT_40, "%40", "%41", "%42")
    MULTIPLY(96, SUMS_48, OUT_48, "%48", "%49", "%50")
}

__device__ __forceinline__ float2 unpacked(u32 pair) {
    if constexpr (IS_HALF) return __half22float2(*reinterpret_cast<__half2*>(&pair));
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// silu(gate) up, of values rounded as if they had been written in between.
__device__ __forceinline__ u32 gated(float gate_0, float gate_1, float up_0, float up_1) {
    const float2 gate = unpacked(packed<IS_HALF>(gate_0, gate_1)), up = unpacked(packed<IS_HALF>(up_0, up_1));
    return packed<IS_HALF>(silu(gate.x) * up.x, silu(gate.y) * up.y);
}

// Adds what a thread of another CTA has left; `parts` is where, of four sums and NUM_CONSUMERS threads at once.
template <int NUM_SUMS>
__device__ __forceinline__ void add_part(float* sums, const float4* parts) {
#pragma unroll
    for (int i = 0; i < NUM_SUMS / 4; i++) {
        const float4 sum = __ldcg(parts + i * NUM_CONSUMERS);
        sums[4 * i] += sum.x, sums[4 * i + 1] += sum.y, sums[4 * i + 2] += sum.z, sums[4 * i + 3] += sum.w;
    }
}

// IS_TRANSPOSED: weights are (K, F) in memory. IS_GATED: features are silu(gate) up, and rows of a left operand eight
// gates and their eight ups in turn, so that a thread has both of a feature.
template <int NUM_ROWS, bool IS_TRANSPOSED, bool IS_GATED>
__global__ void __maxnreg__(MOST_REGISTERS) multiply_rows_kernel(
    const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
    u16* __restrict__ out,  // (N, F)
    float4* partials,       // (CTAs, NUM_SUMS / 4, NUM_CONSUMERS), or (2 bands, CTAs, 2, ...) for a sum over ranks
    int* counters,          // (pieces,) zeros, before and after
    int num_rows, int num_features, Work work, int cell_features) {
    using C = Cut<NUM_ROWS>;
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ u64 barriers[2 * C::NUM_STAGES];

    // The sum over ranks counts its calls, so the one before it has to have ended: see below.
    if (!work.is_reduced) allow_next_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 ring = shared_address(memory);
    const u32 filled = shared_address(barriers), emptied = filled + 8 * C::NUM_STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < C::NUM_STAGES; i++) {
            init_barrier(filled + 8 * i, 1);
            init_barrier(emptied + 8 * i, NUM_CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    Cursor cursor;
    cursor.begin(work, blockIdx.x);

    if (warp == NUM_CONSUMERS / 32) {
        if (lane > 0) return;
        const auto fetch_weights = [&](int stage) {
            const u32 barrier = filled + 8 * stage;
            expect_bytes(barrier, C::STAGE_BYTES);
#pragma unroll
            for (int half = 0; half < C::HALVES; half++) {
                const u32 to = ring + stage * C::STAGE_BYTES + half * C::HALF_BYTES;
                const int element = cursor.block * C::BLOCK + half * ELEMENTS;
                // As `weight_map` has its dimensions.
                if (IS_GATED) {
                    const int first = cursor.tile * FEATURES, cell = first / cell_features;
                    copy_box_once(to, &weight_map, {element, 0, 0, (first - cell * cell_features) / 8, cell}, barrier);
                } else if (IS_TRANSPOSED) {
                    copy_box_once(to, &weight_map, {0, element, cursor.tile * NUM_GROUPS, 0, 0}, barrier);
                } else {
                    copy_box_once(to, &weight_map, {element, cursor.tile * TILE, 0, 0, 0}, barrier);
                }
            }
        };
        const auto fetch_x = [&](int stage) {
#pragma unroll
            for (int half = 0; half < C::HALVES; half++) {
                copy_box(ring + stage * C::STAGE_BYTES + half * C::HALF_BYTES + C::WEIGHT_BYTES, &x_map,
                         cursor.block * C::BLOCK + half * ELEMENTS, 0, filled + 8 * stage);
            }
        };
        const Cursor start = cursor;
        int num_at_first = 0;
        for (; num_at_first < C::NUM_STAGES && !cursor.is_done(); num_at_first++) {
            fetch_weights(num_at_first);
            cursor.advance(work, 1);
        }
        wait_for_kernels_before();
        if (work.is_reduced) allow_next_kernel();
        cursor = start;
        for (int i = 0; i < num_at_first; i++) {
            fetch_x(i);
            cursor.advance(work, 1);
        }
        int stage = 0;
        u32 parity = 0;
        while (!cursor.is_done()) {
            wait_for(emptied + 8 * stage, parity);
            fetch_weights(stage);
            fetch_x(stage);
            cursor.advance(work, 1);
            if (++stage == C::NUM_STAGES) stage = 0, parity ^= 1;
        }
        return;
    }

    const int group = warp / 4;
    float sums[C::NUM_SUMS];
    int stage = 0;
    u32 parity = 0;
    while (!cursor.is_done()) {
        const int tile = cursor.tile, band = cursor.band, num_units = cursor.num_of_tile(work);
        const bool has_first = cursor.block == 0;
        cursor.advance(work, num_units);
#pragma unroll
        for (int i = 0; i < C::NUM_SUMS; i++) sums[i] = 0;
#pragma unroll 1
        for (int unit = 0; unit < num_units; unit++) {
            wait_for(filled + 8 * stage, parity);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int half = 0; half < C::HALVES; half++) {
                const u32 at = ring + stage * C::STAGE_BYTES + half * C::HALF_BYTES;
                const u64 left = matrix_at(at + group * GROUP_BYTES), right = matrix_at(at + C::WEIGHT_BYTES);
#pragma unroll
                for (int k = 0; k < ELEMENTS / 16; k++) {
                    // Sixteen elements on: 32 bytes of a row, or sixteen rows.
                    multiply_add<NUM_ROWS, IS_TRANSPOSED>(sums, left + k * (IS_TRANSPOSED ? 128 : 2), right + k * 2);
                }
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int i = 0; i < C::NUM_SUMS; i++) asm volatile("" : "+f"(sums[i])::"memory");
            if (lane == 0) arrive(emptied + 8 * stage);
            if (++stage == C::NUM_STAGES) stage = 0, parity ^= 1;
        }

        float4* const parts = partials + threadIdx.x;
        int* const group_counters = counters + (tile * NUM_GROUPS + group) * C::PIECES_OF_GROUP;
        // For a sum over ranks every piece has a counter, else all of a group have the first.
        const auto store_part = [&](int part, int num_counters) {
#pragma unroll
            for (int i = 0; i < C::NUM_SUMS / 4; i++) {
                parts[part * C::VECTORS_OF_PART + i * NUM_CONSUMERS] =
                    make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
            }
            sync_group(group);
            if (threadIdx.x % 128 < num_counters) count(group_counters + threadIdx.x % 128);
        };
        if (work.is_reduced) {
            store_part(work.part(band, blockIdx.x, tile), C::PIECES_OF_GROUP);
            continue;
        }
        if (num_units < work.num_blocks) {
            if (!has_first) {
                store_part(blockIdx.x, 1);
                continue;
            }
            const int last = work.cta_of(0, (tile + 1) * work.num_blocks - 1);
            if (threadIdx.x % 128 == 0) {
                wait_until(group_counters, last - blockIdx.x);
                *group_counters = 0;
            }
            sync_group(group);
#pragma unroll 2
            for (int other = blockIdx.x + 1; other <= last; other++) {
                add_part<C::NUM_SUMS>(sums, parts + other * C::VECTORS_OF_PART);
            }
        }

        // Of the operand's sixteen rows that are this warp's: two eights of features, or one with its gates.
        constexpr int FEATURES_OF_WARP = IS_GATED ? 8 : 16;
        u16* const to = out + ((tile * NUM_GROUPS + group) * 4 + warp % 4) * FEATURES_OF_WARP + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < NUM_ROWS / 8; i++) {
            // Two rows of x times operand rows lane / 4 and 8 + lane / 4; then a row of x times two of either.
            const float* const sum = sums + 4 * i;
            const int row = i * 8 + lane / 4;
            u32* const at = reinterpret_cast<u32*>(to + static_cast<long long>(row) * num_features);
            if constexpr (IS_GATED) {
                const u32 pair = transposed(gated(sum[0], sum[1], sum[2], sum[3]));
                if (row < num_rows) at[0] = pair;
            } else {
                const u32 low = transposed(packed<IS_HALF>(sum[0], sum[1]));
                const u32 high = transposed(packed<IS_HALF>(sum[2], sum[3]));
                if (row < num_rows) at[0] = low, at[4] = high;
            }
        }
    }
}

__device__ __forceinline__ void wait_for_flag(const u64* flag, u64 least) {
    u64 seen;
    do {
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
    } while (seen < least);
}

__device__ __forceinline__ void raise_flag(u64* flag, u64 call) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(call) : "memory");
}

// Past the caches: what others write to host memory changes behind their back.
__device__ __forceinline__ uint2 load_slot(const uint2* from) {
    uint2 value;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from) : "memory");
    return value;
}

constexpr int FLAG_STRIDE = 8;  // as host_slots.py has it: each flag has a cache line of its own

// The sum over ranks of the product before it, which goes on meanwhile; that of the first band travels through host
// memory while the second one is computed:
//
//     product    band 0 | band 1 |
//     link out            band 0   band 1
//     link in               band 0   band 1
//
// One CTA for a piece, 64 features of up to 64 rows, adds up the parts of this rank, leaves the result in host memory
// for the others, and adds theirs, in the order of the ranks. What a call writes is not overwritten while it is read:
// host_all_reduce_kernel.py, with a counter of calls for every piece. A rank's call starts when its call before has
// ended, since the product lets this kernel start only when it has waited for all kernels before it.
template <int NUM_ROWS>
__global__ void __launch_bounds__(128) reduce_tiles_kernel(
    const float4* partials, int* counters, u16* __restrict__ result,
    uint2* slots,  // host, (ranks, 2 halves, max_pieces, MOST_ROWS_OF_PIECE / 8, 128)
    u64* flags,    // host, (ranks, max_pieces, FLAG_STRIDE)
    u64* calls,    // (max_pieces,)
    int num_rows, int num_features, Work work, int rank, int num_ranks, int max_pieces) {
    using C = Cut<NUM_ROWS>;
    constexpr int NUM_SUMS = C::ROWS_OF_PIECE / 2, NUM_WORDS = C::ROWS_OF_PIECE / 8;
    allow_next_kernel();
    const int piece = blockIdx.x, tile_and_group = piece / C::PIECES_OF_GROUP;
    const int tile = tile_and_group / NUM_GROUPS, group = tile_and_group % NUM_GROUPS;
    const int piece_of_group = piece % C::PIECES_OF_GROUP;
    const int first_row = piece_of_group * C::ROWS_OF_PIECE;
    num_rows -= first_row;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int band = tile >= work.num_first, first_unit = (tile - work.first_tile(band)) * work.num_blocks;
    const int first = work.cta_of(band, first_unit), last = work.cta_of(band, first_unit + work.num_blocks - 1);
    const u64 call = *const_cast<volatile u64*>(calls + piece) + 1;
    if (threadIdx.x == 0) {
        wait_until(counters + piece, last - first + 1);
        counters[piece] = 0;
    }
    __syncthreads();

    float sums[NUM_SUMS];
#pragma unroll
    for (int i = 0; i < NUM_SUMS; i++) sums[i] = 0;
    const float4* const parts =
        partials + piece_of_group * (NUM_SUMS / 4) * NUM_CONSUMERS + group * 128 + threadIdx.x;
#pragma unroll 3
    for (int cta = first; cta <= last; cta++) {
        add_part<NUM_SUMS>(sums, parts + work.part(band, cta, tile) * C::VECTORS_OF_PART);
    }

    // Of rows 8 i + lane / 4: two features, and the two that are eight further.
    uint2 own[NUM_WORDS];
#pragma unroll
    for (int i = 0; i < NUM_WORDS; i++) {
        own[i] = make_uint2(transposed(packed<IS_HALF>(sums[4 * i], sums[4 * i + 1])),
                            transposed(packed<IS_HALF>(sums[4 * i + 2], sums[4 * i + 3])));
    }
    const auto slot_of = [&](int owner) {
        return slots + ((owner * 2 + call % 2) * max_pieces + piece) * (MOST_ROWS_OF_PIECE / 8) * 128 + threadIdx.x;
    };
    uint2* const mine = slot_of(rank);
#pragma unroll
    for (int i = 0; i < NUM_WORDS; i++) {
        if (i * 8 + lane / 4 < num_rows) mine[i * 128] = own[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        raise_flag(flags + (rank * max_pieces + piece) * FLAG_STRIDE, call);
        for (int peer = 0; peer < num_ranks; peer++) {
            if (peer != rank) wait_for_flag(flags + (peer * max_pieces + piece) * FLAG_STRIDE, call);
        }
    }
    __syncthreads();

    float totals[NUM_WORDS][4] = {};
    for (int owner = 0; owner < num_ranks; owner++) {
        const uint2* const theirs = slot_of(owner);
        uint2 words[NUM_WORDS];
#pragma unroll
        for (int i = 0; i < NUM_WORDS; i++) {
            words[i] = owner == rank || i * 8 + lane / 4 >= num_rows ? own[i] : load_slot(theirs + i * 128);
        }
#pragma unroll
        for (int i = 0; i < NUM_WORDS; i++) {
            const float2 low = unpacked(words[i].x), high = unpacked(words[i].y);
            totals[i][0] += low.x, totals[i][1] += low.y, totals[i][2] += high.x, totals[i][3] += high.y;
        }
    }
    u16* const to = result + static_cast<long long>(first_row) * num_features +
                    tile_and_group * FEATURES + warp * 16 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < NUM_WORDS; i++) {
        const int row = i * 8 + lane / 4;
        if (row < num_rows) {
            u32* const at = reinterpret_cast<u32*>(to + static_cast<long long>(row) * num_features);
            at[0] = packed<IS_HALF>(totals[i][0], totals[i][1]);
            at[4] = packed<IS_HALF>(totals[i][2], totals[i][3]);
        }
    }
    // Whoever waits for this kernel waits for the product too.
    wait_for_kernels_before();
    if (threadIdx.x == 0) calls[piece] = call;
}

constexpr int NORM_THREADS = 512;
constexpr int MAX_VECTORS = 4;  // of eight elements, of a thread

// residual += x, and x becomes the norm of the sum; one CTA a row.
template <int NUM_VECTORS>
__global__ void __launch_bounds__(NORM_THREADS) add_rms_norm_kernel(
    uint4* __restrict__ x, uint4* __restrict__ residual, const uint4* __restrict__ weight, int num_vectors, float eps,
    float weight_offset) {
    __shared__ float squares[NORM_THREADS / 32];
    allow_next_kernel();
    uint4 factors[NUM_VECTORS];
#pragma unroll
    for (int i = 0; i < NUM_VECTORS; i++) {
        const int at = i * NORM_THREADS + threadIdx.x;
        if (at < num_vectors) factors[i] = weight[at];
    }
    wait_for_kernels_before();
    x += static_cast<long long>(blockIdx.x) * num_vectors, residual += static_cast<long long>(blockIdx.x) * num_vectors;
    float2 values[NUM_VECTORS][4];
    float square = 0;
#pragma unroll
    for (int i = 0; i < NUM_VECTORS; i++) {
        const int at = i * NORM_THREADS + threadIdx.x;
        if (at >= num_vectors) break;
        const uint4 added = x[at], old = residual[at];
        const u32 pairs[2][4] = {{added.x, added.y, added.z, added.w}, {old.x, old.y, old.z, old.w}};
        u32 sum[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = unpacked(pairs[0][j]), b = unpacked(pairs[1][j]);
            values[i][j] = make_float2(a.x + b.x, a.y + b.y);
            square += values[i][j].x * values[i][j].x + values[i][j].y * values[i][j].y;
            sum[j] = packed<IS_HALF>(values[i][j].x, values[i][j].y);
        }
        residual[at] = make_uint4(sum[0], sum[1], sum[2], sum[3]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) square += __shfl_xor_sync(0xffffffffu, square, lanes);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) square += squares[i];
    const float scale = rsqrtf(square / (8 * num_vectors) + eps);
#pragma unroll
    for (int i = 0; i < NUM_VECTORS; i++) {
        const int at = i * NORM_THREADS + threadIdx.x;
        if (at >= num_vectors) break;
        const u32 pairs[4] = {factors[i].x, factors[i].y, factors[i].z, factors[i].w};
        u32 norm[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 factor = unpacked(pairs[j]);
            norm[j] = packed<IS_HALF>(values[i][j].x * scale * (factor.x + weight_offset),
                             values[i][j].y * scale * (factor.y + weight_offset));
        }
        x[at] = make_uint4(norm[0], norm[1], norm[2], norm[3]);
    }
}

struct Dimension {
    int size;
    int64_t stride;  // in elements; that of the first is 1
    int box;
};

// Boxes of `tensor` taken to have these dimensions, the innermost first, of which a box has 64 elements.
template <int NUM_DIMENSIONS>
CUtensorMap tensor_map(const TensorView& tensor, const Dimension (&dimensions)[NUM_DIMENSIONS]) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        TVM_FFI_ICHECK(function != nullptr) << "this driver has no cuTensorMapEncodeTiled";
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    constexpr auto TYPE = IS_HALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    cuuint64_t sizes[NUM_DIMENSIONS], strides[NUM_DIMENSIONS];
    cuuint32_t box[NUM_DIMENSIONS], steps[NUM_DIMENSIONS];
    for (int i = 0; i < NUM_DIMENSIONS; i++) {
        sizes[i] = dimensions[i].size, strides[i] = 2 * dimensions[i].stride, box[i] = dimensions[i].box, steps[i] = 1;
    }
    CUtensorMap map;
    const CUresult status = encode(&map, TYPE, NUM_DIMENSIONS, tensor.data_ptr(), sizes, strides + 1, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TVM_FFI_ICHECK(status == CUDA_SUCCESS) << "cuTensorMapEncodeTiled: " << status;
    return map;
}

// Boxes of a tile's weights.
template <bool IS_TRANSPOSED, bool IS_GATED>
CUtensorMap map_of_weights(const TensorView& weight, int cell_features) {
    const int num_weights = weight.size(0), num_elements = weight.size(1);
    const int64_t row = weight.stride(0), column = weight.stride(1);
    constexpr Dimension ONE = {1, ELEMENTS, 1};
    if constexpr (IS_TRANSPOSED) {
        return tensor_map(weight, {{FEATURES, 1, FEATURES},
                                   {num_elements, column, ELEMENTS},
                                   {num_weights / FEATURES, FEATURES, NUM_GROUPS},
                                   ONE, ONE});
    } else if constexpr (IS_GATED) {
        const int num_cells = num_weights / (2 * cell_features);
        return tensor_map(weight, {{num_elements, 1, ELEMENTS},
                                   {8, row, 8},
                                   {2, row * cell_features, 2},  // gates and ups
                                   {cell_features / 8, row * 8, FEATURES / 8},
                                   {num_cells, row * cell_features * 2, 1}});
    } else {
        return tensor_map(weight, {{num_elements, 1, ELEMENTS}, {num_weights, row, TILE}, ONE, ONE, ONE});
    }
}

struct Product {
    const TensorView &x, &weight, &out, &partials, &counters;
    int cell_features = 0;  // 0: not gated
    // Of a sum over ranks.
    int tiles_of_last_band = 0, rank = 0;
    const TensorView *slots = nullptr, *flags = nullptr, *calls = nullptr;
};

template <int NUM_ROWS, bool IS_TRANSPOSED, bool IS_GATED>
void multiply_rows_as(const Product& p) {
    using C = Cut<NUM_ROWS>;
    const int num_rows = p.x.size(0), num_elements = p.x.size(1), num_weights = p.weight.size(0);
    const int num_features = p.out.size(1), num_blocks = num_elements / C::BLOCK, num_tiles = num_weights / TILE;
    const int num_pieces = num_tiles * NUM_GROUPS * C::PIECES_OF_GROUP;
    TVM_FFI_ICHECK(num_elements % C::BLOCK == 0 && num_weights % TILE == 0 && p.cell_features % FEATURES == 0);
    TVM_FFI_ICHECK(p.tiles_of_last_band < num_tiles && p.counters.numel() >= num_pieces);
    ffi::CUDADeviceGuard device_guard(p.x.device().device_id);
    int most_ctas = 0;
    cudaDeviceGetAttribute(&most_ctas, cudaDevAttrMultiProcessorCount, p.x.device().device_id);
    const Work work = divide(num_tiles, num_blocks, most_ctas, p.tiles_of_last_band);
    TVM_FFI_ICHECK(p.partials.numel() >= static_cast<int64_t>(work.num_parts()) * TILE * NUM_ROWS);
    TVM_FFI_ICHECK(!work.is_reduced || work.num_first <= work.num_ctas) << "parts of more than two tiles of a band";
    const CUtensorMap x_map =
        tensor_map(p.x, {{num_elements, 1, ELEMENTS}, {num_rows, p.x.stride(0), NUM_ROWS}});
    const CUtensorMap weight_map = map_of_weights<IS_TRANSPOSED, IS_GATED>(p.weight, p.cell_features);
    auto* const out = static_cast<u16*>(p.out.data_ptr());
    auto* const partials = static_cast<float4*>(p.partials.data_ptr());
    auto* const counters = static_cast<int*>(p.counters.data_ptr());
    const auto kernel = multiply_rows_kernel<NUM_ROWS, IS_TRANSPOSED, IS_GATED>;
    const cudaStream_t stream = get_stream(p.x.device());
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::RING_BYTES);
    if (status == cudaSuccess) {
        status = launch_early(kernel, work.num_ctas, NUM_THREADS, C::RING_BYTES, stream, weight_map, x_map, out,
                              partials, counters, num_rows, num_features, work, p.cell_features);
    }
    if (status == cudaSuccess && work.is_reduced) {
        const int max_pieces = p.flags->size(1), num_ranks = p.flags->size(0);
        TVM_FFI_ICHECK(num_pieces <= max_pieces && p.calls->numel() == max_pieces);
        TVM_FFI_ICHECK(p.slots->numel() == 2ll * num_ranks * max_pieces * FEATURES * MOST_ROWS_OF_PIECE);
        status = launch_early(reduce_tiles_kernel<NUM_ROWS>, num_pieces, 128, 0, stream, partials, counters, out,
                              static_cast<uint2*>(p.slots->data_ptr()), static_cast<u64*>(p.flags->data_ptr()),
                              static_cast<u64*>(p.calls->data_ptr()), num_rows, num_features, work, p.rank, num_ranks,
                              max_pieces);
    }
    TVM_FFI_ICHECK(status == cudaSuccess) << "multiply_rows: " << cudaGetErrorString(status);
}

template <int NUM_ROWS>
void multiply_padded_rows(const Product& p) {
    if (p.weight.stride(0) == 1) {
        multiply_rows_as<NUM_ROWS, true, false>(p);
    } else if (p.cell_features > 0) {
        multiply_rows_as<NUM_ROWS, false, true>(p);
    } else {
        multiply_rows_as<NUM_ROWS, false, false>(p);
    }
}

void multiply(const Product& product) {
    const int num_rows = product.x.size(0);
    switch ((num_rows + 7) / 8) {
        case 1: return multiply_padded_rows<8>(product);
        case 2: return multiply_padded_rows<16>(product);
        case 3: return multiply_padded_rows<24>(product);
        case 4: return multiply_padded_rows<32>(product);
        case 5: return multiply_padded_rows<40>(product);
        case 6: return multiply_padded_rows<48>(product);
        case 7: return multiply_padded_rows<56>(product);
        case 8: return multiply_padded_rows<64>(product);
        case 9: case 10: return multiply_padded_rows<80>(product);
        case 11: case 12: return multiply_padded_rows<96>(product);
    }
    TVM_FFI_ICHECK(false) << "multiply_rows: " << num_rows << " rows, at most " << MOST_ROWS;
}

}  // namespace

// `out` (N, F) of `x` (N, K), N up to 96, and `weight` (F, K), contiguous or the transpose of a contiguous tensor. With
// `cell_features` weight has, cell by cell, so many gates and as many ups, and out is silu(gate) up. Uses `partials`,
// float32, and `counters`, int32 zeros.
void multiply_rows(TensorView x, TensorView weight, TensorView out, TensorView partials, TensorView counters,
                   int64_t cell_features) {
    multiply({x, weight, out, partials, counters, static_cast<int>(cell_features)});
}

// The same, not gated, summed over ranks: `slots` and `flags` are host memory that they share, `calls`, int64, is this
// one's. So many tiles come last, while the others travel.
void multiply_and_reduce_rows(TensorView x, TensorView weight, TensorView out, TensorView partials, TensorView counters,
                              int64_t tiles_of_last_band, int64_t rank, TensorView slots, TensorView flags,
                              TensorView calls) {
    TVM_FFI_ICHECK_GT(tiles_of_last_band, 0);
    multiply({x, weight, out, partials, counters, 0, static_cast<int>(tiles_of_last_band), static_cast<int>(rank),
              &slots, &flags, &calls});
}

// In place: residual (N, M) += x, and x (N, M) is the RMS norm of the sum times weight + weight_offset, M up to 16,384.
void add_rms_norm_rows(TensorView x, TensorView residual, TensorView weight, double eps, double weight_offset) {
    CHECK_INPUT(x);
    CHECK_INPUT(residual);
    const int num_rows = x.size(0), num_vectors = x.size(1) / 8;
    TVM_FFI_ICHECK(x.size(1) % 8 == 0 && num_vectors <= NORM_THREADS * MAX_VECTORS);
    ffi::CUDADeviceGuard device_guard(x.device().device_id);
    // With few vectors a thread it leaves registers to the product that waits for it.
    const auto kernel = num_vectors <= 2 * NORM_THREADS ? add_rms_norm_kernel<2> : add_rms_norm_kernel<MAX_VECTORS>;
    const cudaError_t status =
        launch_early(kernel, num_rows, NORM_THREADS, 0, get_stream(x.device()),
                     static_cast<uint4*>(x.data_ptr()), static_cast<uint4*>(residual.data_ptr()),
                     static_cast<const uint4*>(weight.data_ptr()), num_vectors, static_cast<float>(eps),
                     static_cast<float>(weight_offset));
    TVM_FFI_ICHECK(status == cudaSuccess) << "add_rms_norm_rows: " << cudaGetErrorString(status);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(multiply_rows, multiply_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(multiply_and_reduce_rows, multiply_and_reduce_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm_rows, add_rms_norm_rows);
