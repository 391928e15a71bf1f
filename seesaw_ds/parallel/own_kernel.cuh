// What the CUDA sources of this engine have in common.

#pragma once

#include "tvm_ffi_utils.h"

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// What createpolicy.fractional.L2::evict_first makes, of what is not read again soon; made by it, the compiler has more
// code for every copy.
constexpr u64 READ_ONCE = 0x12F0000000000000;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// The next kernel may start from here on.
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Until all kernels before this one have ended; they may still run where it was launched by `launch_early`.
__device__ __forceinline__ void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <bool IS_HALF>
__device__ __forceinline__ u32 packed(float low, float high) {
    u32 result;
    if constexpr (IS_HALF) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
}

// An 8 x 8 matrix of 16-bit values that a warp holds, two a lane.
__device__ __forceinline__ u32 transposed(u32 matrix) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

// A kernel that may start while the one before it runs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int num_ctas, int num_threads, int shared_bytes,
                         cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = num_ctas, config.blockDim = num_threads, config.dynamicSmemBytes = shared_bytes;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
