// What stands between the products: loops over one token's elements, compiled once for each instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace twofour_cpu {

inline float widen(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  uint32_t word;
  memcpy(&word, &value, sizeof(word));
  return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

// q = clamp(round(x * multiplier), -128, 127) + 128, to nearest, ties to even. `multipliers` is 1 or count.
void quantize_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers, uint8_t* q);
void quantize_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers, uint8_t* q);
// The bfloat16 that holds x * multiplier rounded to e4m3, to nearest, ties to even, and saturated at 448.
void round_to_fp8_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers, uint16_t* y);
void round_to_fp8_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers, uint16_t* y);

// y = x * multiplier.
void multiply_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers, float* y);
void multiply_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers, float* y);

float largest_bf16(const uint16_t* x, int64_t count);  // of the absolute values
float largest_float(const float* x, int64_t count);

uint64_t sum_words(const uint8_t* memory, int64_t count);  // of 8 bytes each

}  // namespace twofour_cpu
