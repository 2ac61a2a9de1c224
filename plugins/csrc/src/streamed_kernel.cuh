// The streamed kernel of one pattern, for nvcc: its entry point, its launch.
#pragma once

#include "ptx.cuh"
#include "streamed.cuh"

#include <cstdlib>

#include "cuda_check.h"
#include "skinny_dispatch.h"
#include "streamed.h"

namespace twofour {

namespace {

// Thread blocks whose registers a multiprocessor must hold, as for the staged kernel (skinny_kernel.cuh): two where a
// search launches two and the shared memory holds them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define TWOFOUR_RESIDENT 1
#else
#define TWOFOUR_RESIDENT 2
#endif
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

// TWOFOUR_PDL=0 makes each launch wait for the end of the kernel before it, to measure what the overlap gives.
bool overlaps() {
  static const bool overlap = [] {
    const char* setting = std::getenv("TWOFOUR_PDL");
    return setting == nullptr || setting[0] != '0';
  }();
  return overlap;
}

}  // namespace

template <int kKeep>
void streamed_configure_pattern(const Multiprocessors& gpu) {
  for (int type : {TWOFOUR_FP16, TWOFOUR_BF16, TWOFOUR_INT8, TWOFOUR_FP8})
    for (int tokens : {8, 16, 32})
      dispatch_tokens<StreamedChoice, kKeep>(type, tokens, [&](auto config) {
        using C = decltype(config);
        check(cudaFuncSetAttribute(streamed_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(gpu.block_shared_bytes)), "cudaFuncSetAttribute");
        check(cudaFuncSetAttribute(streamed_kernel<C>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared), "cudaFuncSetAttribute");
      });
}

template <int kKeep>
void streamed_launch_pattern(int type, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t stream) {
  dispatch_tokens<StreamedChoice, kKeep>(type, problem.tokens, [&](auto config) {
    using C = decltype(config);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.token_blocks));
    launch.blockDim = dim3(C::threads);
    launch.dynamicSmemBytes = plan.shared_bytes;
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = overlaps() ? 1 : 0;
    check(cudaLaunchKernelEx(&launch, streamed_kernel<C>, problem), "skinny kernel launch");
  });
}

}  // namespace twofour
