#include "elementwise.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_ISA __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EACH_ISA
#endif

namespace twofour_cpu {
namespace {

inline uint8_t quantize_one(float value) {
  value = value < -128.f ? -128.f : value > 127.f ? 127.f : value;
  value = (value + 12582912.f) - 12582912.f;  // 1.5 * 2^23 pushes the fraction out: rounds to even on any processor
  return static_cast<uint8_t>(static_cast<int32_t>(value) + 128);
}

// Adding 1.5 * 2^(e + 20), where 2^e is the power of two under |value|, pushes all but 3 bits of the mantissa out.
// Subnormal results share the e of the smallest normal, -6.
inline uint16_t fp8_one(float value) {
  value = value < -448.f ? -448.f : value > 448.f ? 448.f : value;
  uint32_t word;
  memcpy(&word, &value, sizeof(word));
  word &= 0x7F800000u;
  word = word < 0x3C800000u ? 0x3C800000u : word;
  float power;
  memcpy(&power, &word, sizeof(power));
  power *= 1572864.f;
  value = (value + power) - power;
  memcpy(&word, &value, sizeof(word));
  return static_cast<uint16_t>(word >> 16);  // exact
}

}  // namespace

EACH_ISA void quantize_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers, uint8_t* q) {
  if (multipliers == 1) {
    const float m = *multiplier;
    for (int64_t i = 0; i < count; ++i) q[i] = quantize_one(widen(x[i]) * m);
  } else {
    for (int64_t i = 0; i < count; ++i) q[i] = quantize_one(widen(x[i]) * multiplier[i]);
  }
}

EACH_ISA void quantize_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers, uint8_t* q) {
  if (multipliers == 1) {
    const float m = *multiplier;
    for (int64_t i = 0; i < count; ++i) q[i] = quantize_one(x[i] * m);
  } else {
    for (int64_t i = 0; i < count; ++i) q[i] = quantize_one(x[i] * multiplier[i]);
  }
}

EACH_ISA void round_to_fp8_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers,
                                uint16_t* y) {
  if (multipliers == 1) {
    const float m = *multiplier;
    for (int64_t i = 0; i < count; ++i) y[i] = fp8_one(widen(x[i]) * m);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = fp8_one(widen(x[i]) * multiplier[i]);
  }
}

EACH_ISA void round_to_fp8_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers,
                                 uint16_t* y) {
  if (multipliers == 1) {
    const float m = *multiplier;
    for (int64_t i = 0; i < count; ++i) y[i] = fp8_one(x[i] * m);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = fp8_one(x[i] * multiplier[i]);
  }
}

EACH_ISA void multiply_bf16(const uint16_t* x, int64_t count, const float* multiplier, int64_t multipliers, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = widen(x[i]) * multiplier[multipliers == 1 ? 0 : i];
}

EACH_ISA void multiply_float(const float* x, int64_t count, const float* multiplier, int64_t multipliers, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * multiplier[multipliers == 1 ? 0 : i];
}

EACH_ISA float largest_bf16(const uint16_t* x, int64_t count) {
  uint16_t largest = 0;  // magnitudes of floats order like their bits
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t size = x[i] & 0x7FFF;
    largest = size > largest ? size : largest;
  }
  return widen(largest);
}

EACH_ISA float largest_float(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t size;
    memcpy(&size, x + i, sizeof(size));
    size &= 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }
  float value;
  memcpy(&value, &largest, sizeof(value));
  return value;
}

EACH_ISA uint64_t sum_words(const uint8_t* memory, int64_t count) {
  uint64_t lanes[32] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int lane = 0; lane < 32; ++lane) {
      uint64_t word;
      memcpy(&word, memory + 8 * (i + lane), 8);
      lanes[lane] += word;
    }
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace twofour_cpu
