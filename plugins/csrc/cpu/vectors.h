// Sixteen floats at a time, on any instruction set: the compiler splits what a processor's registers do not take.
#pragma once

#include <stdint.h>
#include <string.h>

namespace twofour_cpu {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

template <class To, class From>
ALWAYS_INLINE To bits(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  memcpy(&to, &from, sizeof(to));
  return to;
}

ALWAYS_INLINE Floats all(float value) { return Floats{} + value; }

ALWAYS_INLINE Floats load(const float* at) {
  Floats value;
  memcpy(&value, at, sizeof(value));
  return value;
}
ALWAYS_INLINE Floats load(const uint16_t* at) {  // bfloat16
  Halves half;
  memcpy(&half, at, sizeof(half));
  return bits<Floats>(__builtin_convertvector(half, Words) << 16);
}
ALWAYS_INLINE Floats load(const int8_t* at) {
  Bytes byte;
  memcpy(&byte, at, sizeof(byte));
  return __builtin_convertvector(__builtin_convertvector(byte, Ints), Floats);
}

ALWAYS_INLINE void store(float* at, Floats value) { memcpy(at, &value, sizeof(value)); }
ALWAYS_INLINE void store(uint16_t* at, Floats value) {  // to nearest, ties to even
  const Words word = bits<Words>(value);
  const Halves half = __builtin_convertvector((word + 0x7FFF + (word >> 16 & 1)) >> 16, Halves);
  memcpy(at, &half, sizeof(half));
}

ALWAYS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
ALWAYS_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// To nearest, ties to even, of numbers below 2^22: 1.5 * 2^23 pushes the fraction out.
ALWAYS_INLINE Floats round_to_even(Floats value) { return (value + 12582912.f) - 12582912.f; }

// A number as `Element` holds it.
ALWAYS_INLINE Floats rounded(float, Floats value) { return value; }
ALWAYS_INLINE Floats rounded(uint16_t, Floats value) {
  const Words word = bits<Words>(value);
  return bits<Floats>((word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000u);
}

// One number of all lanes: halves are combined, so that four steps do what a loop does in fifteen.
template <class Combine>
ALWAYS_INLINE float reduced(Floats value, const Combine& combine) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  struct { Eight low, high; } eights = bits<decltype(eights)>(value);
  const Eight eight = combine(eights.low, eights.high);
  struct { Four low, high; } fours = bits<decltype(fours)>(eight);
  const Four four = combine(fours.low, fours.high);
  return combine(combine(four[0], four[2]), combine(four[1], four[3]));
}

ALWAYS_INLINE float sum(Floats value) {
  return reduced(value, [](auto a, auto b) ALWAYS_INLINE_LAMBDA { return a + b; });
}
ALWAYS_INLINE float largest(Floats value) {
  return reduced(value, [](auto a, auto b) ALWAYS_INLINE_LAMBDA { return a > b ? a : b; });
}

// e^x: 2^n times a polynomial of the rest (Cephes' expf), to about one unit in the last place.
ALWAYS_INLINE Floats exponential(Floats x) {
  x = smaller(larger(x, all(-87.f)), all(88.f));
  const Floats n = round_to_even(x * 1.44269504f);
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * bits<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);
}

}  // namespace twofour_cpu
