// CUDA statuses as Failures.
#pragma once

#include <cuda_runtime_api.h>

#include "status.h"

namespace twofour {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  const twofour_status status = error == cudaErrorMemoryAllocation ? TWOFOUR_OUT_OF_MEMORY
                                : error == cudaErrorNoKernelImageForDevice ? TWOFOUR_SM_UNSUPPORTED
                                                                           : TWOFOUR_CUDA_ERROR;
  fail(status, "%s: %s%s", call, cudaGetErrorString(error),
       status == TWOFOUR_SM_UNSUPPORTED ? "; build the library for this GPU: twofour plugins build" : "");
}

}  // namespace twofour
