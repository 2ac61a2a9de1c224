// Namespace gpu for nvcc: the instructions that the skinny kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "registers.h"

#define TWOFOUR_DEVICE __device__ __forceinline__
#define TWOFOUR_UNROLL _Pragma("unroll")

namespace twofour {
namespace gpu {

TWOFOUR_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TWOFOUR_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
TWOFOUR_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
TWOFOUR_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
TWOFOUR_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
TWOFOUR_DEVICE void block_sync() { __syncthreads(); }
TWOFOUR_DEVICE void fence() { __threadfence(); }
TWOFOUR_DEVICE unsigned fetch_add(unsigned* counter) { return atomicAdd(counter, 1u); }

TWOFOUR_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Bypasses L1, which weights would thrash; the L2 prefetches the neighbouring sectors, which the warp reads next.
TWOFOUR_DEVICE void copy_weight(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
TWOFOUR_DEVICE void copy_or_zero(void* shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(copy ? 16 : 0) : "memory");
}
TWOFOUR_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
TWOFOUR_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

TWOFOUR_DEVICE void warp_sync() { __syncwarp(); }

// SM90 and newer from here on. A barrier in shared memory: its phase is done after `arrivals` and the bytes they announce.
TWOFOUR_DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Arrives once this thread's copies so far have landed.
TWOFOUR_DEVICE void arrive_when_copied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
TWOFOUR_DEVICE void publish_barriers() {  // to the copy engine
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
TWOFOUR_DEVICE void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Each product reads each byte of a weight once: evict it from the L2 first.
TWOFOUR_DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}
TWOFOUR_DEVICE void prefetch_to_l2(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
TWOFOUR_DEVICE bool phase_done(uint64_t* barrier, unsigned parity) {
  unsigned done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
TWOFOUR_DEVICE uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// Ends the kernel with an error after 10 seconds: a copy that never lands must not hang the GPU.
TWOFOUR_DEVICE void wait_phase(uint64_t* barrier, unsigned parity) {
  if (phase_done(barrier, parity)) return;
  const uint64_t begin = nanoseconds();
  while (!phase_done(barrier, parity))
    if (nanoseconds() - begin > 10'000'000'000u) __trap();
}
TWOFOUR_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
TWOFOUR_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

TWOFOUR_DEVICE Fragment load_16(const void* shared) {
  const uint4 v = *static_cast<const uint4*>(shared);
  return {{v.x, v.y, v.z, v.w}};
}
TWOFOUR_DEVICE Pair load_8(const void* shared) {
  const uint2 v = *static_cast<const uint2*>(shared);
  return {{v.x, v.y}};
}
// ldmatrix: lane i names row i % 8 of matrix i / 8; lane l receives bytes 4 (l % 4) to +3 of row l / 4 of each matrix.
TWOFOUR_DEVICE Fragment load_matrices(const void* shared) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
               : "r"(shared_address(shared))
               : "memory");
  return f;
}

// The two e4m3 in the low half of v as two fp16, exactly.
TWOFOUR_DEVICE uint32_t widen_fp8(uint32_t v) {
#if __CUDA_ARCH__ >= 890
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16_t>(v & 0xFFFFu)));
  return out;
#else
  __trap();  // never launched: the host refuses fp8 below sm_89
  return v;
#endif
}

#define TWOFOUR_MMA_SP(shape_and_types, constraint, selector)                                                          \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." shape_and_types                                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " selector ";"         \
               : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])                \
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]), "r"(b.r[2]), "r"(b.r[3]), \
                 "r"(metadata))

// d[16, 8] += A[16, K] B[K, 8]; `selector` is a constant once the caller's loop is unrolled.
template <int kType>
TWOFOUR_DEVICE void mma_sp(float (&d)[4], const Fragment& a, const Fragment& b, uint32_t metadata, int selector) {
  if constexpr (kType == TWOFOUR_BF16) {
    if (selector == 0) TWOFOUR_MMA_SP("m16n8k32.row.col.f32.bf16.bf16.f32", "f", "0x0");
    else TWOFOUR_MMA_SP("m16n8k32.row.col.f32.bf16.bf16.f32", "f", "0x1");
  } else {  // fp16, and fp8 widened to fp16
    if (selector == 0) TWOFOUR_MMA_SP("m16n8k32.row.col.f32.f16.f16.f32", "f", "0x0");
    else TWOFOUR_MMA_SP("m16n8k32.row.col.f32.f16.f16.f32", "f", "0x1");
  }
}
template <int kType>
TWOFOUR_DEVICE void mma_sp(int (&d)[4], const Fragment& a, const Fragment& b, uint32_t metadata, int) {
  TWOFOUR_MMA_SP("m16n8k64.row.col.s32.s8.s8.s32", "r", "0x0");
}

// Four of the eight bytes of `low` and `high` (number 4 on), as the low half bytes of `selector` (0 to 7) number them.
TWOFOUR_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

#define TWOFOUR_MMA(shape_and_types, constraint)                                                                         \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
               : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])                \
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]))

// The same with dense operands: K = 16 for 16 bit (and fp8 widened to fp16), 32 for int8.
template <int kType>
TWOFOUR_DEVICE void mma(float (&d)[4], const Fragment& a, const Pair& b) {
  if constexpr (kType == TWOFOUR_BF16) TWOFOUR_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
  else TWOFOUR_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f");
}
template <int kType>
TWOFOUR_DEVICE void mma(int (&d)[4], const Fragment& a, const Pair& b) {
  TWOFOUR_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r");
}

// Each operation rounds separately, without fusing: bit-identical to the reference in plugins/common/numerics.py.
TWOFOUR_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
TWOFOUR_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }

TWOFOUR_DEVICE float load_float(int type, const void* values, int64_t index) {
  return type == TWOFOUR_FP16 ? __half2float(static_cast<const __half*>(values)[index])
                              : __bfloat162float(static_cast<const __nv_bfloat16*>(values)[index]);
}
TWOFOUR_DEVICE void store_float(int type, void* values, int64_t index, float value) {
  if (type == TWOFOUR_FP16) static_cast<__half*>(values)[index] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(values)[index] = __float2bfloat16_rn(value);
}

// Blocks exchange partial sums: bypasses the L1 caches.
TWOFOUR_DEVICE void store_partial(uint32_t* p, float value) { __stcg(p, __float_as_uint(value)); }
TWOFOUR_DEVICE void store_partial(uint32_t* p, int value) { __stcg(p, static_cast<uint32_t>(value)); }
template <class T>
TWOFOUR_DEVICE T load_partial(const uint32_t* p);
template <>
TWOFOUR_DEVICE float load_partial<float>(const uint32_t* p) {
  return __uint_as_float(__ldcg(p));
}
template <>
TWOFOUR_DEVICE int load_partial<int>(const uint32_t* p) {
  return static_cast<int>(__ldcg(p));
}

}  // namespace gpu
}  // namespace twofour
