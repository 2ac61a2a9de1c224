// Elements of matrices as doubles, for the stand-ins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <library_types.h>

#include <cstdint>
#include <cstring>

inline size_t bytes_of(cudaDataType type) {
  return type == CUDA_R_32F || type == CUDA_R_32I ? 4 : type == CUDA_R_16F || type == CUDA_R_16BF ? 2 : 1;
}

inline double load(cudaDataType type, const void* p, int64_t i) {
  switch (type) {
    case CUDA_R_32F: return static_cast<const float*>(p)[i];
    case CUDA_R_32I: return static_cast<const int*>(p)[i];
    case CUDA_R_16F: return __half2float(static_cast<const __half*>(p)[i]);
    case CUDA_R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case CUDA_R_8I: return static_cast<const int8_t*>(p)[i];
    default: return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<const uint8_t*>(p)[i], __NV_E4M3)));
  }
}

inline void store(cudaDataType type, void* p, int64_t i, double value) {
  switch (type) {
    case CUDA_R_32F: static_cast<float*>(p)[i] = static_cast<float>(value); break;
    case CUDA_R_32I: static_cast<int*>(p)[i] = static_cast<int>(value); break;
    case CUDA_R_16F: static_cast<__half*>(p)[i] = __float2half(static_cast<float>(value)); break;
    default: static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(static_cast<float>(value)); break;
  }
}
