// Dense weights: the check of their pattern, the packed form, and the epilogue of kernels that leave raw sums.
#pragma once

#include <cuda_runtime_api.h>

#include "layout_of8.h"

namespace twofour {

// Index, counted along the rows, of the first group with more nonzeros than the pattern allows, or -1.
int64_t first_violation_host(Form form, const Extent& extent, const void* weight);
int64_t first_violation_device(Form form, const Extent& extent, const void* weight, cudaStream_t stream);

void pack_host(Form form, const Extent& extent, const void* weight, uint8_t* packed);
void pack_device(Form form, const Extent& extent, const void* weight, uint8_t* packed, cudaStream_t stream);
void unpack_host(Form form, const Extent& extent, const uint8_t* packed, void* weight);
void unpack_device(Form form, const Extent& extent, const uint8_t* packed, void* weight, cudaStream_t stream);

// target = source with every -0.0 as 0; cuSPARSELt's compression takes -0.0 for a nonzero.
void copy_canonical(int type, int64_t elements, const void* source, void* target, cudaStream_t stream);

// y[tokens, out_features] = scale * sums + bias, or += where the problem accumulates. `sums` are dense, int32 for int8
// weights and fp32 otherwise; out_features and y's pitch are multiples of 4.
void apply_epilogue(const twofour_gemm& gemm, const void* sums, void* y, cudaStream_t stream);

// One activation x * multiplier as a byte of int8 or e4m3.
void quantize(int type, int x_type, int64_t tokens, int64_t in_features, const void* x, const float* multiplier,
              int64_t count, uint8_t* q, cudaStream_t stream);

}  // namespace twofour
