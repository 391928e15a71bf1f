// Attention of decode rows, one token each, over paged KV: one layer. What it reads is planned by row_plan.py.
//
// It is bound by memory, so all is about reading. Each multiprocessor has one CTA (thread block), and every warp of it
// an equal share of the pages of all (row, KV head)s laid end to end. A warp copies its pages into a ring of its own in
// shared memory, a page ahead of the one it works on: no warp waits for another before its share is done. A (row, KV
// head) that is cut is put together in three steps:
//
//     in a warp    all pages of its share
//     in a CTA     the warp that has the first page adds the other warps' results, which they leave in shared memory
//     of CTAs      each writes its result to global memory, and the last to do so adds them up
//
// Scores are made transposed, (tokens, query heads) = K q^T, and so is the result, (dims, query heads) = V^T P^T: of
// the 16 x 8 results of an mma, up to 8 query heads of a KV head then leave fewer unused.

#include "own_kernel.cuh"

namespace {

constexpr int HEAD_DIM = 128;
constexpr int PAGE = 16;      // tokens
constexpr int MAX_GROUP = 8;  // query heads of a KV head
constexpr int STAGES = 2;     // pages of a warp's ring; WARPS, of a CTA, is defined by row_attention.py
constexpr int ROW_BYTES = HEAD_DIM * 2;                  // a token's K or V
constexpr int PAGE_BYTES = 2 * PAGE * ROW_BYTES;         // K, then V
constexpr int TILES = HEAD_DIM / 16;                     // 16-dim slices of a head
constexpr int PARTIAL = TILES * 32 * 4 + 2 * MAX_GROUP;  // floats of a Result in memory
constexpr int SHARED_BYTES = WARPS * (STAGES * PAGE_BYTES + PARTIAL * 4);
constexpr float NEG_INF = -__builtin_huge_valf();

struct __align__(16) Share {         // consecutive pages that a warp reads; as row_plan.py writes it
    int row, head, page, num_pages;  // where it begins; pages in all
    int row_first_block, row_num_tokens;
    int ids[STAGES];                 // blocks of the first pages, while they are of one (row, KV head)
};

struct __align__(16) Split {  // of a CTA; as row_plan.py writes it
    // CTAs that have parts of the (row, KV head) that it begins in: the first and how many; how many have parts of the
    // one that it ends in; and row * num_heads + head of the former.
    int first_cta, num_ctas_at_begin, num_ctas_at_end, begin;
};

struct Row {  // as row_plan.py writes it
    int first_block, num_tokens;
};

__device__ __forceinline__ void copy_16(u32 to, const u16* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(READ_ONCE)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int NUM_LATER>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NUM_LATER) : "memory");
}

__device__ __forceinline__ void load_tile(u32 (&tile)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed_tile(u32 (&tile)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

template <bool IS_HALF>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (IS_HALF) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// What `counter` was before this thread; stores that it knows of come before, and the others' before its later loads.
__device__ __forceinline__ int count(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float inverse_of(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float max_of_tokens(float x) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

__device__ __forceinline__ float sum_of_tokens(float x) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// Dims [16 tile, 16 tile + 16) of a KV head's query heads, from accumulators.
template <bool IS_HALF>
__device__ __forceinline__ void store_tile(
    u16* out, int group, int tile, const float (&sum)[4], float inverse_0, float inverse_1) {
    const int lane = threadIdx.x % 32;
    const u32 low = transposed(packed<IS_HALF>(sum[0] * inverse_0, sum[1] * inverse_1));
    const u32 high = transposed(packed<IS_HALF>(sum[2] * inverse_0, sum[3] * inverse_1));
    if (lane / 4 < group) {
        u32* to = reinterpret_cast<u32*>(out + lane / 4 * HEAD_DIM + tile * 16 + lane % 4 * 2);
        to[0] = low;
        to[4] = high;
    }
}

__device__ __forceinline__ int num_pages_of(int num_tokens) { return (num_tokens + PAGE - 1) / PAGE; }

// The pages of a warp's share, one after the other, into its ring.
struct Reader {
    const u16* kv;
    const Row* rows;
    const int* blocks;
    long long block_stride, head_stride, value_stride;
    int num_heads;
    int row, head, page, num_left;             // the next page to read, and the pages left
    int first_block, num_pages, next_row_end;  // of the row, and of the one after it
    int ids, ids_from;                         // lane i has the block of page ids_from + i
    int next_ids;                              // those that come next, of this segment or another
    u32 targets[4];                            // in a stage: where a lane's chunk of token 2 i or 2 i + 1 goes

    __device__ __forceinline__ void begin(const Share& share) {
        row = share.row, head = share.head, page = share.page, num_left = share.num_pages;
        first_block = share.row_first_block, num_pages = num_pages_of(share.row_num_tokens);
        const int lane = threadIdx.x % 32;
        if (num_left > 0) {
            ids_from = page;
            ids = blocks[first_block + page + lane];
            next_row_end = rows[row + 2].first_block;
            load_next_ids();
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 2 * i + lane / 16;
            targets[i] = lane / 16 * ROW_BYTES + ((lane % 16) ^ token) * 16;
        }
    }

    __device__ __forceinline__ void load_next_ids() {
        int at = first_block;
        if (ids_from + 32 < num_pages) {
            at += ids_from + 32;
        } else if (head + 1 == num_heads) {
            at += num_pages;
        }
        next_ids = blocks[at + threadIdx.x % 32];
    }

    __device__ __forceinline__ bool is_at_last_page() const { return page == num_pages - 1; }

    __device__ __forceinline__ int next_id() { return __shfl_sync(0xffffffffu, ids, page - ids_from); }

    __device__ __forceinline__ void read_page(int id, u32 stage) {
        const u16* keys = kv + id * block_stride + head * head_stride + threadIdx.x % 32 * 8;
        const u16* values = keys + value_stride;
#pragma unroll
        for (int i = 0; i < 8; i++) copy_16(stage + targets[i % 4] + i * 512, keys + i * 256);
#pragma unroll
        for (int i = 0; i < 8; i++) copy_16(stage + targets[i % 4] + (i + 8) * 512, values + i * 256);
        num_left--;
        page++;
        if (page == num_pages) {
            if (++head == num_heads) {
                head = 0;
                row++;
                first_block += num_pages;
                num_pages = next_row_end - first_block;
                if (num_left > 0) next_row_end = rows[row + 2].first_block;
            }
            page = ids_from = 0;
            ids = next_ids;
            if (num_left > 0) load_next_ids();
        } else if (page == ids_from + 32) {
            ids_from = page;
            ids = next_ids;
            if (num_left > 0) load_next_ids();
        }
    }
};

__device__ __forceinline__ void load_query(u32 (&query)[TILES][2], const u16* queries, int index, int group) {
    const int lane = threadIdx.x % 32;
    // Past the group its last head again: what comes of that is not stored.
    const long long head = static_cast<long long>(index) * group + min(lane / 4, group - 1);
    const u32* from = reinterpret_cast<const u32*>(queries + head * HEAD_DIM) + lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) query[tile][0] = from[tile * 8], query[tile][1] = from[tile * 8 + 4];
}

// Attention to some pages: lanes hold sums as an mma's accumulators, over tokens, for query heads 2 (lane % 4) and the
// next; the largest scores, and the totals of exp2(scale * (score - largest)).
template <bool IS_HALF>
struct Result {
    float sums[TILES][4];
    float max_0, max_1, total_0, total_1;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) sums[tile][0] = sums[tile][1] = sums[tile][2] = sums[tile][3] = 0;
        max_0 = max_1 = NEG_INF;
        total_0 = total_1 = 0;
    }

    __device__ __forceinline__ void raise_max(float new_max_0, float new_max_1, float scale) {
        const float factor_0 = exp2_of((max_0 - new_max_0) * scale), factor_1 = exp2_of((max_1 - new_max_1) * scale);
        max_0 = new_max_0, max_1 = new_max_1;
        total_0 *= factor_0, total_1 *= factor_1;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            sums[tile][0] *= factor_0, sums[tile][1] *= factor_1;
            sums[tile][2] *= factor_0, sums[tile][3] *= factor_1;
        }
    }

    __device__ __forceinline__ void store_partial(float* slot) const {
        const int lane = threadIdx.x % 32;
        float4* tiles = reinterpret_cast<float4*>(slot);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            tiles[tile * 32 + lane] = make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
        }
        if (lane < 4) {
            reinterpret_cast<float4*>(slot + TILES * 128)[lane] = make_float4(max_0, max_1, total_0, total_1);
        }
    }

    __device__ __forceinline__ void add_partials(const float* slots, int from, int to, float scale) {
        const int lane = threadIdx.x % 32;
        float new_max_0 = max_0, new_max_1 = max_1;
        for (int i = from; i < to; i++) {
            const float2 maxima = *reinterpret_cast<const float2*>(slots + i * PARTIAL + TILES * 128 + lane % 4 * 4);
            new_max_0 = fmaxf(new_max_0, maxima.x), new_max_1 = fmaxf(new_max_1, maxima.y);
        }
        raise_max(new_max_0, new_max_1, scale);
#pragma unroll 1
        for (int i = from; i < to; i++) {
            const float4* tiles = reinterpret_cast<const float4*>(slots + i * PARTIAL);
            const float4 rest = tiles[TILES * 32 + lane % 4];
            const float factor_0 = exp2_of((rest.x - max_0) * scale), factor_1 = exp2_of((rest.y - max_1) * scale);
            total_0 += factor_0 * rest.z, total_1 += factor_1 * rest.w;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const float4 sum = tiles[tile * 32 + lane];
                sums[tile][0] += factor_0 * sum.x, sums[tile][1] += factor_1 * sum.y;
                sums[tile][2] += factor_0 * sum.z, sums[tile][3] += factor_1 * sum.w;
            }
        }
    }

    __device__ __forceinline__ void store(u16* out, int index, int group) const {
        u16* to = out + static_cast<long long>(index) * group * HEAD_DIM;
        const float inverse_0 = inverse_of(total_0), inverse_1 = inverse_of(total_1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) store_tile<IS_HALF>(to, group, tile, sums[tile], inverse_0, inverse_1);
    }
};

template <bool IS_HALF>
__global__ void __launch_bounds__(WARPS * 32, 1) attend_rows_kernel(
    const u16* __restrict__ queries,   // (rows, heads, group, 128)
    const u16* __restrict__ kv,        // (blocks, 2, heads, 16, 128), the first three strided
    u16* __restrict__ out,             // as queries
    const Share* __restrict__ shares,  // (CTAs, WARPS)
    const Split* __restrict__ splits,  // (CTAs,)
    const Row* __restrict__ rows,      // (rows + 2,), of which the last two have no tokens
    const int* __restrict__ blocks,    // of all rows, and 64 more
    float* partials,                   // (CTAs, 2, PARTIAL)
    int* counters,                     // (CTAs,) zeros, before and after
    int num_heads, int group, long long block_stride, long long value_stride, long long head_stride, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    // Of each warp, whether its share begins with the rest of a (row, KV head): 1, or 3 with that one's end.
    __shared__ int heads[WARPS];
    __shared__ int merges[2];  // by side of the CTA: the (row, KV head) that other CTAs have parts of, if all are there

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 ring = shared_address(memory + warp * STAGES * PAGE_BYTES);
    float* const slots = reinterpret_cast<float*>(memory + WARPS * STAGES * PAGE_BYTES);
    if (lane == 0) heads[warp] = 0;
    if (threadIdx.x < 2) merges[threadIdx.x] = -1;
    // Until it waits this kernel reads what those before it do not write: its plan, and pages but for the last of a
    // row, where the row's new token goes.
    allow_next_kernel();

    const Share share = shares[blockIdx.x * WARPS + warp];
    const int first_ids = shares[blockIdx.x * WARPS + warp].ids[lane % STAGES];
    const Split split = splits[blockIdx.x];
    Reader reader{kv, rows, blocks, block_stride, head_stride, value_stride, num_heads};
    reader.begin(share);
    const int num_at_hand = num_pages_of(share.row_num_tokens) - share.page;  // if it is no more than STAGES
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        if (i < share.num_pages) {
            if (reader.is_at_last_page()) wait_for_kernels_before();
            const int id = i < num_at_hand ? __shfl_sync(0xffffffffu, first_ids, i) : reader.next_id();
            reader.read_page(id, ring + i * PAGE_BYTES);
        }
        commit_copies();
    }
    wait_for_kernels_before();

    // Where a lane's rows of 8x8 matrices are in a stage, tile 0; tile i is 32 i bytes on, before the swizzle.
    const u32 key_address = ring + lane % 16 * ROW_BYTES + (lane / 16 ^ lane % 8) * 16;
    const u32 value_address = ring + (PAGE + lane % 8 + lane / 16 * 8) * ROW_BYTES + (lane / 8 % 2 ^ lane % 8) * 16;
    u32 stage = 0;
    int index = share.row * num_heads + share.head, head = share.head, row = share.row;
    int page = share.page, num_left = share.num_pages;
    int length = share.row_num_tokens, next_length = 0;
    u32 next_query[TILES][2];
    Result<IS_HALF> result;
    bool has_tail = false;
    if (num_left > 0) {
        load_query(next_query, queries, index, group);
        next_length = rows[row + 1].num_tokens;
    }
    while (num_left > 0) {
        const int num_pages = num_pages_of(length);
        const int begin = page, end = min(num_pages, page + num_left);
        u32 query[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            query[tile][0] = next_query[tile][0], query[tile][1] = next_query[tile][1];
        }
        num_left -= end - begin;
        if (num_left > 0) load_query(next_query, queries, index + 1, group);
        result.clear();
#pragma unroll 1
        for (; page < end; page++) {
            wait_copies<STAGES - 1>();
            __syncwarp();
            float scores[2][4] = {};  // of tokens lane / 4 and 8 + lane / 4, query heads 2 (lane % 4) and the next
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 keys[4];
                load_tile(keys, (key_address + stage) ^ (tile * 32));
                multiply_add<IS_HALF>(scores[tile % 2], keys, query[tile][0], query[tile][1]);
            }
            float score[4];
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = scores[0][i] + scores[1][i];
            const int num_tokens = length - page * PAGE;
            if (num_tokens < PAGE) {
                if (lane / 4 >= num_tokens) score[0] = score[1] = NEG_INF;
                if (lane / 4 + 8 >= num_tokens) score[2] = score[3] = NEG_INF;
            }
            const float new_max_0 = fmaxf(result.max_0, max_of_tokens(fmaxf(score[0], score[2])));
            const float new_max_1 = fmaxf(result.max_1, max_of_tokens(fmaxf(score[1], score[3])));
            if (__any_sync(0xffffffffu, new_max_0 > result.max_0 || new_max_1 > result.max_1)) {
                result.raise_max(new_max_0, new_max_1, scale);
            }
            const float bias_0 = result.max_0 * scale, bias_1 = result.max_1 * scale;
            score[0] = exp2_of(score[0] * scale - bias_0), score[1] = exp2_of(score[1] * scale - bias_1);
            score[2] = exp2_of(score[2] * scale - bias_0), score[3] = exp2_of(score[3] * scale - bias_1);
            result.total_0 += score[0] + score[2], result.total_1 += score[1] + score[3];
            const u32 low = transposed(packed<IS_HALF>(score[0], score[1]));
            const u32 high = transposed(packed<IS_HALF>(score[2], score[3]));
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 values[4];
                load_transposed_tile(values, (value_address + stage) ^ (tile * 32));
                multiply_add<IS_HALF>(result.sums[tile], values, low, high);
            }
            __syncwarp();
            if (reader.num_left > 0) reader.read_page(reader.next_id(), ring + stage);
            commit_copies();
            stage = stage == (STAGES - 1) * PAGE_BYTES ? 0 : stage + PAGE_BYTES;
        }
        result.total_0 = sum_of_tokens(result.total_0), result.total_1 = sum_of_tokens(result.total_1);
        if (begin > 0) {
            result.store_partial(slots + warp * PARTIAL);
            if (lane == 0) heads[warp] = end == num_pages ? 3 : 1;
        } else if (end == num_pages) {
            result.store(out, index, group);
        } else {
            has_tail = true;
        }
        if (num_left > 0) {
            page = 0;
            index++;
            if (++head == num_heads) {
                head = 0;
                row++;
                length = next_length;
                next_length = rows[row + 1].num_tokens;
            }
        }
    }
    __syncthreads();

    const int first_ctas[2] = {split.first_cta, static_cast<int>(blockIdx.x)};
    const int nums_ctas[2] = {split.num_ctas_at_begin, split.num_ctas_at_end};
    // What a warp began and did not end goes on at the head of the next warps' shares, or in the next CTA; what the CTA
    // begins with is added up by a warp that seldom has to wait for other CTAs on its own behalf.
    const int state = lane < WARPS ? heads[lane] : 0;
    const u32 exists = __ballot_sync(0xffffffffu, state & 1), ends = __ballot_sync(0xffffffffu, state & 2);
#pragma unroll 1
    for (int side = 1; side >= 0; side--) {  // 1: from this warp's tail on, 0: from the CTA's first page on
        if (side == 1 ? !has_tail : warp != WARPS - 2 || !(exists & 1)) continue;
        const int from = side == 1 ? warp + 1 : 0;
        int to = from + __ffs((~exists | ends) >> from) - 1;
        const bool is_done = ends >> to & 1;
        if (is_done) to++;
        if (side == 0) {
            result.clear();
            index = split.begin;
        }
        if (from < to) result.add_partials(slots, from, to, scale);
        if (side == 1 && is_done) {
            result.store(out, index, group);
            continue;
        }
        result.store_partial(partials + (blockIdx.x * 2 + side) * PARTIAL);
        __syncwarp();
        if (lane == 0) {
            int* counter = counters + first_ctas[side];
            if (count(counter) == nums_ctas[side] - 1) {
                *counter = 0;
                merges[side] = index;
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int side = 0; side < 2; side++) {
        if (merges[side] < 0) continue;
        const int first_cta = first_ctas[side], num_ctas = nums_ctas[side];
#pragma unroll 1
        for (int tile = warp; tile < TILES; tile += WARPS) {
            constexpr int AT_ONCE = 16;
            float sum[4] = {};
            float max_0 = NEG_INF, max_1 = NEG_INF, total_0 = 0, total_1 = 0;
#pragma unroll 1
            for (int from = 0; from < num_ctas; from += AT_ONCE) {
                float4 sums[AT_ONCE], rests[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    // The first CTA has the beginning, on its far side.
                    const int slot = (first_cta + from + i) * 2 + (from + i == 0);
                    const float4* part = reinterpret_cast<const float4*>(partials + slot * PARTIAL);
                    const bool is_part = from + i < num_ctas;
                    sums[i] = is_part ? __ldcg(part + tile * 32 + lane) : make_float4(0, 0, 0, 0);
                    rests[i] = is_part ? __ldcg(part + TILES * 32 + lane % 4) : make_float4(NEG_INF, NEG_INF, 0, 0);
                }
                float new_max_0 = max_0, new_max_1 = max_1;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    new_max_0 = fmaxf(new_max_0, rests[i].x), new_max_1 = fmaxf(new_max_1, rests[i].y);
                }
                const float old_0 = exp2_of((max_0 - new_max_0) * scale), old_1 = exp2_of((max_1 - new_max_1) * scale);
                max_0 = new_max_0, max_1 = new_max_1;
                total_0 *= old_0, total_1 *= old_1;
                sum[0] *= old_0, sum[1] *= old_1, sum[2] *= old_0, sum[3] *= old_1;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const float factor_0 = exp2_of((rests[i].x - max_0) * scale);
                    const float factor_1 = exp2_of((rests[i].y - max_1) * scale);
                    total_0 += factor_0 * rests[i].z, total_1 += factor_1 * rests[i].w;
                    sum[0] += factor_0 * sums[i].x, sum[1] += factor_1 * sums[i].y;
                    sum[2] += factor_0 * sums[i].z, sum[3] += factor_1 * sums[i].w;
                }
            }
            store_tile<IS_HALF>(out + static_cast<long long>(merges[side]) * group * HEAD_DIM, group, tile, sum,
                       inverse_of(total_0), inverse_of(total_1));
        }
    }
}

}  // namespace

// One layer of the rows that `plan` is for, (N, H, 128) `queries` to `out`; `plan` is an int32 RowPlan.packed with room
// for `max_num_rows`. Uses `partials`, float32 of (CTAs, 2, PARTIAL), and `counters`, int32 zeros, one a CTA.
void attend_rows(TensorView queries, TensorView kv_cache, TensorView out, TensorView plan, TensorView partials,
                 TensorView counters, int64_t max_num_rows, double scale) {
    CHECK_INPUT(queries);
    CHECK_INPUT(out);
    CHECK_INPUT_AND_TYPE(plan, dl_int32);
    TVM_FFI_ICHECK(kv_cache.ndim() == 5 && kv_cache.stride(3) == HEAD_DIM && kv_cache.stride(4) == 1)
        << "a block's tokens must be contiguous";
    const int num_ctas = counters.size(0);
    const int num_heads = kv_cache.size(2), group = queries.size(1) / num_heads;
    TVM_FFI_ICHECK(kv_cache.size(3) == PAGE && kv_cache.size(4) == HEAD_DIM && group <= MAX_GROUP);
    TVM_FFI_ICHECK_EQ(partials.numel(), num_ctas * 2 * PARTIAL);
    const auto* shares = static_cast<const Share*>(plan.data_ptr());
    const auto* splits = reinterpret_cast<const Split*>(shares + num_ctas * WARPS);
    const auto* rows = reinterpret_cast<const Row*>(splits + num_ctas);
    const auto* blocks = reinterpret_cast<const int*>(rows + max_num_rows + 2);
    ffi::CUDADeviceGuard device_guard(queries.device().device_id);
    const auto kernel = encode_dlpack_dtype(queries.dtype()) == float16_code ? attend_rows_kernel<true>
                                                                              : attend_rows_kernel<false>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (status == cudaSuccess) {
        constexpr float LOG2_E = 1.44269504f;
        status = launch_early(
            kernel, num_ctas, WARPS * 32, SHARED_BYTES, get_stream(queries.device()),
            static_cast<const u16*>(queries.data_ptr()), static_cast<const u16*>(kv_cache.data_ptr()),
            static_cast<u16*>(out.data_ptr()), shares, splits, rows, blocks, static_cast<float*>(partials.data_ptr()),
            static_cast<int*>(counters.data_ptr()), num_heads, group, kv_cache.stride(0), kv_cache.stride(1),
            kv_cache.stride(2), static_cast<float>(scale) * LOG2_E);
    }
    TVM_FFI_ICHECK(status == cudaSuccess) << "attend_rows: " << cudaGetErrorString(status);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend_rows, attend_rows);
