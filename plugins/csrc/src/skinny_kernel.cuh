// The staged kernel of one pattern, for nvcc: its entry point, its launch.
#pragma once

#include "ptx.cuh"
#include "skinny.cuh"

#include "cuda_check.h"
#include "skinny.h"
#include "skinny_dispatch.h"

namespace twofour {

namespace {

// One thread block a multiprocessor, named, lets those of n:8 have the registers that they need; 0 names none.
template <class C>
__global__ void __launch_bounds__(C::threads, C::keep == kKeep2of4 ? 0 : 1) skinny_kernel(const SkinnyProblem problem) {
  extern __shared__ __align__(16) uint8_t shared[];
  skinny_block<C>(problem, shared);
}

}  // namespace

template <int kKeep>
void skinny_configure_pattern() {
  for (int type : {TWOFOUR_FP16, TWOFOUR_BF16, TWOFOUR_INT8, TWOFOUR_FP8})
    for (int tokens : {8, 16, 32})
      dispatch_tokens<SkinnyChoice, kKeep>(type, tokens, [](auto config) {
        using C = decltype(config);
        check(cudaFuncSetAttribute(skinny_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes),
              "cudaFuncSetAttribute");
      });
}

template <int kKeep>
void skinny_launch_pattern(int type, const SkinnyProblem& problem, cudaStream_t stream) {
  dispatch_tokens<SkinnyChoice, kKeep>(type, problem.tokens, [&](auto config) {
    using C = decltype(config);
    const SkinnyGeometry g = skinny_geometry({type, kKeep}, problem.tokens, problem.out_features, problem.in_features);
    const dim3 grid(static_cast<unsigned>(g.token_blocks), static_cast<unsigned>(g.row_blocks),
                    static_cast<unsigned>(problem.splits));
    skinny_kernel<C><<<grid, C::threads, C::shared_bytes, stream>>>(problem);
    check(cudaGetLastError(), "skinny kernel launch");
  });
}

}  // namespace twofour
