// The inner products, one set of functions an instruction set.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace twofour_cpu {

// A product on inputs as the kernels read them: int8 forms uint8 (the number plus 128), bf16 forms bfloat16, rows padded
// to whole blocks with any values.
struct Product {
  int form;
  int64_t rows, tokens, blocks, tile_bytes;
  const uint8_t* weight;
  const int32_t* offsets;  // [tiles * 32] of an int8 form: 128 times each row's sum
  bool holds_lowest;       // whether an int8 weight holds -128
  const float* scales;     // [rows] or NULL: `scale`
  float scale;
  const float* token_scales;  // [tokens] or NULL
  const float* bias;          // [rows] or NULL
  const uint8_t* x;
  int64_t x_stride;  // bytes
  void* y;
  int64_t y_stride;  // elements
  int y_type;
};

// Computes rows 32 * first to 32 * (first + tiles) - 1 of the product for all tokens.
using Kernel = void (*)(const Product& product, int64_t first, int64_t tiles);

struct Kernels {  // of dense, 2:4 and n:8 weights
  Kernel int8[3], bf16[3];

  Kernel of(int form) const { return (is_int8(form) ? int8 : bf16)[is_dense(form) ? 0 : is_2of4(form) ? 1 : 2]; }
};

extern const Kernels kPortable, kAvx2, kAvx512;  // of kAvx512, bf16 needs AVX512-BF16; elsewhere AVX2's serve

}  // namespace twofour_cpu
