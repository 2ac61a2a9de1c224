// What a decoder block computes for one token between its products. Compiled for each instruction set where it is inlined.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "vectors.h"

namespace twofour_cpu {
namespace {

// y = weight * (x / root mean square of x), the quotient rounded first; `add`, where given, is added to x before.
template <class T>
ALWAYS_INLINE void rms_norm(T* x, const T* add, const T* weight, float eps, int64_t count, T* y) {
  Floats squares{};
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats value = load(x + i);
    if (add) {
      value = rounded(T{}, value + load(add + i));
      store(x + i, value);
    }
    squares += value * value;
  }
  const float inverse = 1.f / sqrtf(sum(squares) / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; i += kLanes)
    store(y + i, load(weight + i) * rounded(T{}, load(x + i) * inverse));
}

// The rotary embedding of one head, in place: x cos + (-second half, first half) sin.
template <class T>
ALWAYS_INLINE void rotate(T* x, const T* cos, const T* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Floats a = load(x + i), b = load(x + half + i);
    store(x + i, rounded(T{}, a * load(cos + i)) - rounded(T{}, b * load(sin + i)));
    store(x + half + i, rounded(T{}, b * load(cos + half + i)) + rounded(T{}, a * load(sin + half + i)));
  }
}

template <class T>
ALWAYS_INLINE void silu_times(const T* gate, const T* up, int64_t count, T* y) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats g = load(gate + i);
    store(y + i, rounded(T{}, g / (1.f + exponential(-g))) * load(up + i));
  }
}

template <class T>
ALWAYS_INLINE void keep(const T* x, int64_t count, float, T* cached) {
  memcpy(cached, x, count * sizeof(T));
}
template <class T>
ALWAYS_INLINE void keep(const T* x, int64_t count, float multiplier, int8_t* cached) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats q = round_to_even(smaller(larger(load(x + i) * multiplier, all(-128.f)), all(127.f)));
    const Bytes byte = __builtin_convertvector(__builtin_convertvector(q, Ints), Bytes);
    memcpy(cached + i, &byte, sizeof(byte));
  }
}

// What a block's attention reads of one sequence.
template <class C>
struct Sequence {
  const C *keys, *values;  // of one head in page 0
  const int32_t* pages;    // NULL: the sequence lies in page `page` alone
  int64_t page, page_size, page_stride, first, length;

  ALWAYS_INLINE int64_t run_end(int64_t position) const {
    return std::min(length, (position / page_size + 1) * page_size);
  }
  ALWAYS_INLINE int64_t offset(int64_t position, int64_t head_dim) const {
    const int64_t at = pages ? pages[position / page_size] : page;
    return at * page_stride + position % page_size * head_dim;
  }
};

// Attention of one query head. `scores` holds the sequence's length, rounded up to whole vectors.
template <class T, class C>
ALWAYS_INLINE void attend(const T* q, const Sequence<C>& s, int64_t dim, float scale, float v_scale, float* scores,
                          T* y) {
  const int64_t parts = dim / kLanes;
  Floats query[16], total[16] = {};  // head_dim up to 256
  for (int64_t i = 0; i < parts; ++i) query[i] = load(q + i * kLanes) * scale;
  float* score = scores;
  for (int64_t position = s.first; position < s.length;) {
    const C* key = s.keys + s.offset(position, dim);
    for (const int64_t end = s.run_end(position); position < end; ++position, key += dim) {
      Floats products{};
      for (int64_t i = 0; i < parts; ++i) products += query[i] * load(key + i * kLanes);
      *score++ = sum(products);
    }
  }
  const int64_t count = s.length - s.first, padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  Floats most = all(-INFINITY), weights{};
  for (int64_t i = 0; i < padded; i += kLanes) most = larger(most, load(scores + i));
  const float peak = largest(most);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats at = load(scores + i), weight = at == -INFINITY ? Floats{} : exponential(at - peak);
    store(scores + i, weight);
    weights += weight;
  }
  score = scores;
  for (int64_t position = s.first; position < s.length;) {
    const C* value = s.values + s.offset(position, dim);
    for (const int64_t end = s.run_end(position); position < end; ++position, value += dim, ++score)
      for (int64_t i = 0; i < parts; ++i) total[i] += *score * load(value + i * kLanes);
  }
  const float inverse = 1.f / sum(weights);
  for (int64_t i = 0; i < parts; ++i) {
    const Floats out = rounded(T{}, total[i] * inverse);
    store(y + i * kLanes, v_scale == 1.f ? out : out * v_scale);
  }
}

}  // namespace
}  // namespace twofour_cpu
