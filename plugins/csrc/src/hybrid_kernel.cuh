// The hybrid kernel of one pattern, for nvcc: its entry point, its launch.
#pragma once

#include "streamed_launch.cuh"

#include "hybrid.cuh"
#include "hybrid.h"
#include "skinny_dispatch.h"

namespace twofour {

namespace {

// Thread blocks whose registers a multiprocessor must hold: as the streamed kernel of n:8 (streamed_kernel.cuh).
template <class H>
__global__ void __launch_bounds__(H::threads, H::token_tiles == 1 ? TWOFOUR_RESIDENT : 1)
    hybrid_kernel(const __grid_constant__ HybridProblem problem) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  hybrid_block<H>(problem, shared);
#else
  __trap();  // never launched: the host refuses the kernel there
#endif
}

}  // namespace

template <int kKeep>
void hybrid_configure_pattern(const Multiprocessors& gpu) {
  for (int type : {TWOFOUR_FP16, TWOFOUR_BF16, TWOFOUR_INT8, TWOFOUR_FP8})
    for (int tokens : {8, 16, 32})
      dispatch_tokens<HybridChoice, kKeep>(type, tokens,
                                           [&](auto config) { allow_all_shared(hybrid_kernel<decltype(config)>, gpu); });
}

template <int kKeep>
void hybrid_launch_pattern(int type, const HybridProblem& problem, const StreamedPlan& plan, cudaStream_t stream) {
  dispatch_tokens<HybridChoice, kKeep>(type, problem.sparse.tokens, [&](auto config) {
    using H = decltype(config);
    launch_overlapping(hybrid_kernel<H>, problem, plan, H::threads, stream, "hybrid kernel launch");
  });
}

}  // namespace twofour
