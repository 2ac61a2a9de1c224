// The streamed kernel of one pattern, for nvcc: its entry point, its launch.
#pragma once

#include "streamed_launch.cuh"

#include "skinny_dispatch.h"
#include "streamed.cuh"

namespace twofour {

namespace {

// Registers of as many thread blocks as for the staged kernel (skinny_kernel.cuh).
template <class C>
__global__ void __launch_bounds__(C::threads, C::keep == kKeep2of4   ? 0
                                              : C::token_tiles == 1 ? TWOFOUR_RESIDENT
                                                                    : 1) streamed_kernel(const SkinnyProblem problem) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  streamed_block<C>(problem, shared);
#else
  __trap();  // never launched: the host chooses the staged kernel there
#endif
}

}  // namespace

template <int kKeep>
void streamed_configure_pattern(const Multiprocessors& gpu) {
  for (int type : {TWOFOUR_FP16, TWOFOUR_BF16, TWOFOUR_INT8, TWOFOUR_FP8})
    for (int tokens : {8, 16, 32})
      dispatch_tokens<StreamedChoice, kKeep>(type, tokens,
                                             [&](auto config) { allow_all_shared(streamed_kernel<decltype(config)>, gpu); });
}

template <int kKeep>
void streamed_launch_pattern(int type, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t stream) {
  dispatch_tokens<StreamedChoice, kKeep>(type, problem.tokens, [&](auto config) {
    using C = decltype(config);
    launch_overlapping(streamed_kernel<C>, problem, plan, C::threads, stream, "skinny kernel launch");
  });
}

}  // namespace twofour
