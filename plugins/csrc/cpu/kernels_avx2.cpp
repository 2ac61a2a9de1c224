// AVX2 and FMA. A 2:4 unit is expanded by byte shuffles whose controls come from a table of the mask's bytes.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs, saturating at 16 bits: |x| times w with x's sign stays
// within them for weights of -127 to 127. A weight that holds -128 is multiplied by the portable kernel.
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>

namespace twofour_cpu {
namespace {

constexpr int kAhead = 1024;  // bytes between a block's use and its prefetch

// For each byte of a mask (two groups of 4), which of 4 values goes to each of its 8 elements; plus 0, 4, 8 and 12.
struct Controls {
  uint64_t of[4][256];
  constexpr Controls() : of() {
    for (int part = 0; part < 4; ++part)
      for (int mask = 0; mask < 256; ++mask) {
        uint64_t control = 0;
        int next = 4 * part;
        for (int i = 0; i < 8; ++i)
          control |= static_cast<uint64_t>(mask >> i & 1 ? next++ & 15 : 0x80) << (8 * i);
        of[part][mask] = control;
      }
  }
};
constexpr Controls kControls;

struct Unit {
  __m256i low, high;  // rows 0 to 7 and 8 to 15 of an int8 unit, 4 inputs each
};

inline __m256i expand_half(const uint8_t* values, uint32_t mask) {
  const auto control = [&](int part) { return static_cast<int64_t>(kControls.of[part][mask >> (8 * part) & 255]); };
  const __m256i controls = _mm256_set_epi64x(control(3), control(2), control(1), control(0));
  const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), controls);
}

template <bool Sparse>
inline Unit int8_unit(const uint8_t* half, int unit) {
  if constexpr (!Sparse) {
    const __m256i* at = reinterpret_cast<const __m256i*>(half + 64 * unit);
    return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
  }
  uint64_t mask;
  memcpy(&mask, half + 256 + 8 * unit, 8);
  const uint8_t* values = half + 32 * unit;
  return {expand_half(values, static_cast<uint32_t>(mask)), expand_half(values + 16, static_cast<uint32_t>(mask >> 32))};
}

// y of one token and 8 rows from their sums.
inline void finish(const Product& p, int64_t row, int64_t token, __m256 value) {
  const int64_t left = p.rows - row;
  if (left <= 0) return;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i rows = _mm256_cmpgt_epi32(_mm256_set1_epi32(left > 8 ? 8 : static_cast<int>(left)), lane);
  if (p.scales || p.scale != 1.f)
    value = _mm256_mul_ps(value, p.scales ? _mm256_maskload_ps(p.scales + row, rows) : _mm256_set1_ps(p.scale));
  if (p.token_scales) value = _mm256_mul_ps(value, _mm256_set1_ps(p.token_scales[token]));
  if (p.bias) value = _mm256_add_ps(value, _mm256_maskload_ps(p.bias + row, rows));
  if (p.y_type == TWOFOUR_CPU_FLOAT32) {
    _mm256_maskstore_ps(static_cast<float*>(p.y) + token * p.y_stride + row, rows, value);
    return;
  }
  const __m256i bits = _mm256_castps_si256(value);  // rounded to nearest even
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i words = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  uint16_t* y = static_cast<uint16_t*>(p.y) + token * p.y_stride + row;
  if (left >= 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), half);
  } else {
    uint16_t all[8];
    memcpy(all, &half, sizeof(all));
    memcpy(y, all, left * sizeof(uint16_t));
  }
}

template <int Bytes>
inline void prefetch(const uint8_t* at) {
#pragma GCC unroll 16
  for (int i = 0; i < Bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + i), _MM_HINT_T0);
}

// The functions below compute one half (0 or 1) of a tile; halves take turns in memory.
template <bool Sparse, int Tokens>
void int8_product(const Product& p, int64_t tile, int half, int64_t token) {
  constexpr int kHalf = Sparse ? 320 : 512;
  __m256i low[Tokens] = {}, high[Tokens] = {};
  const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(static_cast<char>(kInt8Offset));
  const uint8_t* w = p.weight + tile * p.tile_bytes + half * kHalf;
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * kHalf, x += kBlockInputs) {
    prefetch<kHalf>(w);
#pragma GCC unroll 8
    for (int unit = 0; unit < 8; ++unit) {
      const Unit rows = int8_unit<Sparse>(w, unit);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        int32_t four;
        memcpy(&four, x + t * p.x_stride + 4 * unit, 4);
        const __m256i inputs = _mm256_xor_si256(_mm256_set1_epi32(four), offset), size = _mm256_abs_epi8(inputs);
        const auto product = [&](__m256i w8) {
          return _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(w8, inputs)), ones);
        };
        low[t] = _mm256_add_epi32(low[t], product(rows.low));
        high[t] = _mm256_add_epi32(high[t], product(rows.high));
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    finish(p, tile * kTileRows + half * kHalfRows, token + t, _mm256_cvtepi32_ps(low[t]));
    finish(p, tile * kTileRows + half * kHalfRows + 8, token + t, _mm256_cvtepi32_ps(high[t]));
  }
}

template <int Tokens>
void bf16_product(const Product& p, int64_t tile, int half, int64_t token) {
  constexpr int kHalf = 1024;
  __m256 low[Tokens] = {}, high[Tokens] = {};
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  const uint8_t* w = p.weight + tile * p.tile_bytes + half * kHalf;
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * kHalf, x += 2 * kBlockInputs) {
    prefetch<kHalf>(w);
#pragma GCC unroll 16
    for (int unit = 0; unit < 16; ++unit) {
      const __m256i* at = reinterpret_cast<const __m256i*>(w + 64 * unit);
      const __m256i rows[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        int32_t pair;
        memcpy(&pair, x + t * p.x_stride + 4 * unit, 4);
        const __m256i inputs = _mm256_set1_epi32(pair);
        const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(inputs, 16));
        const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(inputs, upper));
        const auto add = [&](__m256 sum, __m256i w2) {
          sum = _mm256_fmadd_ps(first, _mm256_castsi256_ps(_mm256_slli_epi32(w2, 16)), sum);
          return _mm256_fmadd_ps(second, _mm256_castsi256_ps(_mm256_and_si256(w2, upper)), sum);
        };
        low[t] = add(low[t], rows[0]);
        high[t] = add(high[t], rows[1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    finish(p, tile * kTileRows + half * kHalfRows, token + t, low[t]);
    finish(p, tile * kTileRows + half * kHalfRows + 8, token + t, high[t]);
  }
}

template <bool Sparse, int Tokens>
struct Int8 {
  static void run(const Product& p, int64_t i, int64_t token) {
    int8_product<Sparse, Tokens>(p, i / 2, static_cast<int>(i % 2), token);
  }
};

template <bool, int Tokens>
struct Bf16 {
  static void run(const Product& p, int64_t i, int64_t token) {
    bf16_product<Tokens>(p, i / 2, static_cast<int>(i % 2), token);
  }
};

// All tokens of a run of tiles, as many at once as registers allow.
template <template <bool, int> class Step, bool Sparse>
void all_tokens(const Product& p, int64_t first, int64_t tiles) {
  if (p.holds_lowest) return kPortable.of_form[p.form](p, first, tiles);
  for (int64_t half = 2 * first; half < 2 * (first + tiles); ++half) {
    int64_t token = 0;
    for (; p.tokens - token >= 4; token += 4) Step<Sparse, 4>::run(p, half, token);
    for (; p.tokens - token >= 2; token += 2) Step<Sparse, 2>::run(p, half, token);
    if (token < p.tokens) Step<Sparse, 1>::run(p, half, token);
  }
}

}  // namespace

// bf16 2:4 has no kernel of its own here: dense bf16 reads more and is faster.
const Kernels kAvx2 = {{all_tokens<Int8, false>, all_tokens<Int8, true>, all_tokens<Bf16, false>,
                        kPortable.of_form[TWOFOUR_CPU_BF16_2OF4]}};

}  // namespace twofour_cpu
#pragma GCC pop_options
#endif
