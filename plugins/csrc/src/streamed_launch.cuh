// How the streamed kernels are launched: with all of the shared memory, before the kernel before them has ended.
#pragma once

#include <cstdlib>

#include "cuda_check.h"
#include "ptx.cuh"
#include "streamed.h"

// Thread blocks whose registers a multiprocessor must hold: two where a search launches two and the shared memory holds them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define TWOFOUR_RESIDENT 1
#else
#define TWOFOUR_RESIDENT 2
#endif

namespace twofour {

namespace {

// TWOFOUR_PDL=0 makes each launch wait for the end of the kernel before it, to measure what the overlap gives.
bool overlaps() {
  static const bool overlap = [] {
    const char* setting = std::getenv("TWOFOUR_PDL");
    return setting == nullptr || setting[0] != '0';
  }();
  return overlap;
}

template <class Kernel>
void allow_all_shared(Kernel kernel, const Multiprocessors& gpu) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(gpu.block_shared_bytes)),
        "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
}

template <class Problem>
void launch_overlapping(void (*kernel)(Problem), const std::remove_const_t<Problem>& problem, const StreamedPlan& plan,
                        int threads, cudaStream_t stream, const char* what) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.token_blocks));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = plan.shared_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = overlaps() ? 1 : 0;
  check(cudaLaunchKernelEx(&launch, kernel, problem), what);
}

}  // namespace

}  // namespace twofour
