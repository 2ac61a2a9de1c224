// AVX2 and FMA. A row's packed 2:4 values stay where they are: a byte shuffle brings each the input that it multiplies.
// An n:8 tile is expanded into the cache and multiplied as a dense one.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs, saturating at 16 bits: |x| times w with x's sign stays
// within them for weights of -127 to 127. A weight that holds -128 is multiplied by the portable kernel.
#include <string.h>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#include <immintrin.h>

namespace twofour_cpu {
namespace {

constexpr int kAhead = 2048;  // bytes between a block's use and its prefetch

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

// Four inputs, as signed numbers, in each lane of 32 bits.
inline __m256i signed_inputs(const uint8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof(four));
  return _mm256_xor_si256(_mm256_set1_epi32(four), _mm256_set1_epi8(static_cast<char>(kInt8Offset)));
}

// Sums of two products of signed bytes, as 16 bits.
inline __m256i pair_products(__m256i inputs, __m256i w) {
  return _mm256_maddubs_epi16(_mm256_abs_epi8(inputs), _mm256_sign_epi8(w, inputs));
}

template <int Bytes>
inline void prefetch(const uint8_t* at) {
#pragma GCC unroll 16
  for (int i = 0; i < Bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + i), _MM_HINT_T0);
}

struct Rows {
  __m256 low, high;  // sums of rows 0 to 7 and 8 to 15 of a half
};

// y of `Halves` halves of a tile from half `first` on; `sums` gives a half's Rows for one token.
template <int Halves, int Tokens, class Sums>
inline void finish_halves(const Product& p, int64_t tile, int first, int64_t token, const Sums& sums) {
#pragma GCC unroll 8
  for (int i = 0; i < Halves * Tokens; ++i) {
    const int half = i / Tokens, t = i % Tokens;
    const int64_t row = tile * kTileRows + (first + half) * kHalfRows;
    const Rows rows = sums(half, t);
    finish(p, row, token + t, rows.low);
    finish(p, row + 8, token + t, rows.high);
  }
}

// The functions below compute `Halves` halves of a tile at `w` from half `first` on; halves take turns in memory.
template <int Halves, int Tokens>
void int8_product(const Product& p, const uint8_t* w, int64_t tile, int first, int64_t token) {
  constexpr int kHalf = half_bytes(TWOFOUR_CPU_INT8);
  __m256i low[Halves][Tokens] = {}, high[Halves][Tokens] = {};
  const __m256i ones = _mm256_set1_epi16(1);
  w += first * kHalf;
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * kHalf, x += kBlockInputs) {
    prefetch<Halves * kHalf>(w);
#pragma GCC unroll 8
    for (int unit = 0; unit < 8; ++unit)
#pragma GCC unroll 2
      for (int half = 0; half < Halves; ++half) {
        const __m256i* at = reinterpret_cast<const __m256i*>(w + half * kHalf + 64 * unit);
        const __m256i rows[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const __m256i inputs = signed_inputs(x + t * p.x_stride + 4 * unit);
          __m256i &above = low[half][t], &below = high[half][t];
          above = _mm256_add_epi32(above, _mm256_madd_epi16(pair_products(inputs, rows[0]), ones));
          below = _mm256_add_epi32(below, _mm256_madd_epi16(pair_products(inputs, rows[1]), ones));
        }
      }
  }
  finish_halves<Halves, Tokens>(p, tile, first, token, [&](int half, int t) {
    return Rows{_mm256_cvtepi32_ps(low[half][t]), _mm256_cvtepi32_ps(high[half][t])};
  });
}

// For each of a unit's 16 rows, which two of the 4 inputs its values multiply: a byte shuffle's control. A mask's four
// bits have two set, so that three of them tell all six masks apart and leave a bit to choose the first or the second.
inline __m256i choose_inputs(const uint8_t* mask) {
  const __m256i choices = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, 1, 0, 2, 0, 1, 0, /* the second: */ 0, 3, 3, 1, 3, 2, 2, 0));
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                          4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  int64_t bits;
  memcpy(&bits, mask, sizeof(bits));
  const __m256i even = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), spread);
  const __m256i rows = _mm256_blend_epi16(even, _mm256_srli_epi16(even, 4), 0xAA);
  const __m256i three = _mm256_and_si256(rows, _mm256_set1_epi8(7));
  return _mm256_shuffle_epi8(choices, _mm256_or_si256(three, _mm256_set1_epi16(8 << 8)));
}

// 2:4: the weights stay packed, and each row's two values meet the inputs that they belong to.
template <int Halves, int Tokens>
void int8_2of4_product(const Product& p, const uint8_t* w, int64_t tile, int first, int64_t token) {
  constexpr int kHalf = half_bytes(TWOFOUR_CPU_INT8_2OF4), kMasks = 256;
  __m256i low[Halves][Tokens] = {}, high[Halves][Tokens] = {};  // rows 0 to 3 and 8 to 11 of a half, and the others
  const __m256i ones = _mm256_set1_epi16(1);
  w += first * kHalf;
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * kHalf, x += kBlockInputs) {
    prefetch<Halves * kHalf>(w);
#pragma GCC unroll 4
    for (int unit = 0; unit < 8; unit += 2)
#pragma GCC unroll 2
      for (int half = 0; half < Halves; ++half) {
        const uint8_t* const masks = w + half * kHalf + kMasks + 8 * unit;
        const __m256i choose[2] = {choose_inputs(masks), choose_inputs(masks + 8)};
        const __m256i* const values = reinterpret_cast<const __m256i*>(w + half * kHalf + 32 * unit);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const uint8_t* const at = x + t * p.x_stride + 4 * unit;
          const auto rows = [&](int i) {
            return pair_products(_mm256_shuffle_epi8(signed_inputs(at + 4 * i), choose[i]),
                                 _mm256_load_si256(values + i));
          };
          const __m256i even = rows(0), odd = rows(1);
          __m256i &some = low[half][t], &others = high[half][t];
          some = _mm256_add_epi32(some, _mm256_madd_epi16(_mm256_unpacklo_epi16(even, odd), ones));
          others = _mm256_add_epi32(others, _mm256_madd_epi16(_mm256_unpackhi_epi16(even, odd), ones));
        }
      }
  }
  finish_halves<Halves, Tokens>(p, tile, first, token, [&](int half, int t) {
    const __m256i some = low[half][t], others = high[half][t];
    return Rows{_mm256_cvtepi32_ps(_mm256_permute2x128_si256(some, others, 0x20)),
                _mm256_cvtepi32_ps(_mm256_permute2x128_si256(some, others, 0x31))};
  });
}

template <int Halves, int Tokens>
void bf16_product(const Product& p, const uint8_t* w, int64_t tile, int first, int64_t token) {
  constexpr int kHalf = half_bytes(TWOFOUR_CPU_BF16);
  __m256 low[Halves][Tokens] = {}, high[Halves][Tokens] = {};
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  w += first * kHalf;
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * kHalf, x += 2 * kBlockInputs) {
    prefetch<Halves * kHalf>(w);
#pragma GCC unroll 16
    for (int unit = 0; unit < 16; ++unit)
#pragma GCC unroll 2
      for (int half = 0; half < Halves; ++half) {
        const __m256i* at = reinterpret_cast<const __m256i*>(w + half * kHalf + 64 * unit);
        const __m256i rows[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          int32_t pair;
          memcpy(&pair, x + t * p.x_stride + 4 * unit, 4);
          const __m256i inputs = _mm256_set1_epi32(pair);
          const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(inputs, 16));
          const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(inputs, upper));
          const auto add = [&](__m256 sum, __m256i w2) {
            sum = _mm256_fmadd_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(w2, 16)), sum);
            return _mm256_fmadd_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(w2, upper)), sum);
          };
          low[half][t] = add(low[half][t], rows[0]);
          high[half][t] = add(high[half][t], rows[1]);
        }
      }
  }
  finish_halves<Halves, Tokens>(p, tile, first, token,
                                [&](int half, int t) { return Rows{low[half][t], high[half][t]}; });
}

template <bool Sparse, int Halves, int Tokens>
struct Int8 {
  static void run(const Product& p, const uint8_t* w, int64_t tile, int first, int64_t token) {
    if constexpr (Sparse) int8_2of4_product<Halves, Tokens>(p, w, tile, first, token);
    else int8_product<Halves, Tokens>(p, w, tile, first, token);
  }
};

template <bool, int Halves, int Tokens>
struct Bf16 {
  static void run(const Product& p, const uint8_t* w, int64_t tile, int first, int64_t token) {
    bf16_product<Halves, Tokens>(p, w, tile, first, token);
  }
};

// All tokens of a tile, as many at once as registers allow; of few, a whole tile is read in one pass.
template <template <bool, int, int> class Step, bool Sparse>
void all_tokens_of(const Product& p, const uint8_t* w, int64_t tile) {
  int64_t token = 0;
  for (; p.tokens - token >= 4; token += 4) {
    Step<Sparse, 1, 4>::run(p, w, tile, 0, token);
    Step<Sparse, 1, 4>::run(p, w, tile, 1, token);
  }
  for (; p.tokens - token >= 2; token += 2) Step<Sparse, 2, 2>::run(p, w, tile, 0, token);
  if (token < p.tokens) Step<Sparse, 2, 1>::run(p, w, tile, 0, token);
}

template <template <bool, int, int> class Step, bool Sparse>
void all_tokens(const Product& p, int64_t first, int64_t tiles) {
  if (p.holds_lowest) return kPortable.of(p.form)(p, first, tiles);
  for (int64_t tile = first; tile < first + tiles; ++tile)
    all_tokens_of<Step, Sparse>(p, p.weight + tile * p.tile_bytes, tile);
}

// For each mask of 8 elements the byte shuffle that brings the values to their places, and zeros to the others.
struct Shuffles {
  uint8_t of_mask[256][8];

  constexpr Shuffles() : of_mask() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, next = 0; i < 8; ++i) of_mask[mask][i] = static_cast<uint8_t>(mask >> i & 1 ? next++ : 0x80);
  }
};
constexpr Shuffles kShuffles;

const uint8_t* expand_tile(const Product& p, const uint8_t* w, Scratch& scratch) {
  const int64_t halves = 2 * p.blocks;
  const int half = half_bytes(p.form), masks_in_half = masks_at(p.form), octet_values = kHalfRows * kept_of_8(p.form);
  uint8_t* const dense = scratch.bytes(halves * kHalfElements + kAhead);
  uint8_t* target = dense;
  for (int64_t i = 0; i < halves; ++i, w += half) {
    const uint8_t* mask = w + masks_in_half;
    for (const uint8_t* octet = w; octet < w + masks_in_half; octet += octet_values) {
      const uint8_t* values = octet;
      for (int step = 0; step < kOctetMaskBytes; ++step, ++mask, target += 8) {
        const __m128i next = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.of_mask[*mask]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(next, places));
        values += __builtin_popcount(*mask);
      }
    }
  }
  return dense;
}

void int8_nof8(const Product& p, int64_t first, int64_t tiles) {
  if (p.holds_lowest) return kPortable.of(p.form)(p, first, tiles);
  static thread_local Scratch scratch;
  for (int64_t tile = first; tile < first + tiles; ++tile)
    all_tokens_of<Int8, false>(p, expand_tile(p, p.weight + tile * p.tile_bytes, scratch), tile);
}

}  // namespace

// Sparse bf16 has no kernel of its own here: dense bf16 reads more and is faster.
const Kernels kAvx2 = {{all_tokens<Int8, false>, all_tokens<Int8, true>, int8_nof8},
                       {all_tokens<Bf16, false>, kPortable.bf16[1], kPortable.bf16[2]}};

}  // namespace twofour_cpu
#pragma GCC pop_options
#endif
