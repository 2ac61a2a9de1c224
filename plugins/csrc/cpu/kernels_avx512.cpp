// AVX-512: int8 by VNNI (vpdpbusd), bf16 by AVX512-BF16 (vdpbf16ps), 2:4 and n:8 weights expanded in registers by VBMI2.
#include <string.h>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc's own headers, where an operand is not read
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx512bf16")
#include <immintrin.h>

namespace twofour_cpu {
namespace {

constexpr int kAhead = 2048;  // bytes between a block's use and its prefetch

enum Zeros { kStored, k2of4, kNof8 };  // how a form leaves zeros out

inline void prefetch(const uint8_t* at, int bytes) {
#pragma GCC unroll 16
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + i), _MM_HINT_T0);
}

// The values of an n:8 half that lie before those of unit `unit`, whose mask is a `Mask`.
template <class Mask>
inline int values_before(const uint8_t* masks, int kept, int unit) {
  constexpr int kUnits = kOctetMaskBytes / sizeof(Mask);
  int values = unit / kUnits * kHalfRows * kept;
#pragma GCC unroll 4
  for (int before = unit / kUnits * kUnits; before < unit; ++before) {
    Mask mask;
    memcpy(&mask, masks + before * sizeof(Mask), sizeof(Mask));
    values += __builtin_popcountll(mask);
  }
  return values;
}

// The values of unit `unit` of a half that keeps `kept` of 8 inputs; behind them whatever follows.
template <Zeros Form, class Mask>
inline __m512i unit_values(const uint8_t* half, const uint8_t* masks, int kept, int unit) {
  if constexpr (Form == k2of4)
    return _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(half + 32 * unit)));
  else  // ends within the masks of the half at the latest
    return _mm512_loadu_si512(half + values_before<Mask>(masks, kept, unit) * (8 / static_cast<int>(sizeof(Mask))));
}

// Unit `unit` of a half of an int8 block: 16 rows x 4 inputs.
template <Zeros Form>
inline __m512i int8_unit(const uint8_t* half, int kept, int unit) {
  if constexpr (Form == kStored) return _mm512_load_si512(half + 64 * unit);
  const uint8_t* const masks = half + 64 * kept;
  uint64_t mask;
  memcpy(&mask, masks + 8 * unit, 8);
  return _mm512_maskz_expand_epi8(_cvtu64_mask64(mask), unit_values<Form, uint64_t>(half, masks, kept, unit));
}

// Unit `unit` of a half of a sparse bf16 block: 8 rows x 4 inputs.
template <Zeros Form>
inline __m512i bf16_sparse_unit(const uint8_t* half, int kept, int unit) {
  const uint8_t* const masks = half + 128 * kept;
  uint32_t mask;
  memcpy(&mask, masks + 4 * unit, 4);
  return _mm512_maskz_expand_epi16(_cvtu32_mask32(mask), unit_values<Form, uint32_t>(half, masks, kept, unit));
}

inline __m512i broadcast4(const uint8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

inline __m512i broadcast8(const uint8_t* x) {
  int64_t eight;
  memcpy(&eight, x, 8);
  return _mm512_set1_epi64(eight);
}

// y of one token and 16 rows from their sums, one a lane.
inline void finish(const Product& p, int64_t row, int64_t token, __m512 value) {
  const int64_t left = p.rows - row;
  if (left <= 0) return;
  const __mmask16 rows = left >= kHalfRows ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
  if (p.scales || p.scale != 1.f)
    value = _mm512_mul_ps(value, p.scales ? _mm512_maskz_loadu_ps(rows, p.scales + row) : _mm512_set1_ps(p.scale));
  if (p.token_scales) value = _mm512_mul_ps(value, _mm512_set1_ps(p.token_scales[token]));
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, p.bias + row));
  if (p.y_type == TWOFOUR_CPU_FLOAT32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p.y) + token * p.y_stride + row, rows, value);
    return;
  }
  const __m512i bits = _mm512_castps_si512(value);  // rounded to nearest even
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.y) + token * p.y_stride + row, rows, words);
}

// A tile's two halves for `Tokens` tokens at once. Ways: independent sums of one result, which hide latency where there
// are few results.
template <Zeros Form, int Tokens>
void int8_product(const Product& p, const uint8_t* w, int64_t tile, int64_t token) {
  constexpr int kWays = Tokens == 1 ? 2 : 1;
  const int kept = Form == kNof8 ? kept_of_8(p.form) : 4;
  const int half = Form == kStored ? 512 : 64 * kept + 64;  // bytes
  __m512i sums[2][Tokens][kWays];
#pragma GCC unroll 32
  for (int i = 0; i < 2 * Tokens * kWays; ++i) sums[i % 2][i / 2 % Tokens][i / 2 / Tokens] = __m512i{};
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * half, x += kBlockInputs) {
    prefetch(w, 2 * half);
#pragma GCC unroll 8
    for (int unit = 0; unit < 8; ++unit) {
      const __m512i rows[2] = {int8_unit<Form>(w, kept, unit), int8_unit<Form>(w + half, kept, unit)};
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        const __m512i inputs = broadcast4(x + t * p.x_stride + 4 * unit);
        __m512i &low = sums[0][t][unit % kWays], &high = sums[1][t][unit % kWays];
        low = _mm512_dpbusd_epi32(low, inputs, rows[0]);
        high = _mm512_dpbusd_epi32(high, inputs, rows[1]);
      }
    }
  }
#pragma GCC unroll 2
  for (int side = 0; side < 2; ++side) {
    const int64_t row = tile * kTileRows + side * kHalfRows;
    const __m512i offset = _mm512_load_si512(p.offsets + row);
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
      __m512i sum = sums[side][t][0];
      if (kWays == 2) sum = _mm512_add_epi32(sum, sums[side][t][kWays - 1]);
      finish(p, row, token + t, _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset)));
    }
  }
}

template <Zeros Form, int Tokens>
void bf16_product(const Product& p, const uint8_t* w, int64_t tile, int64_t token) {
  constexpr bool kSparse = Form != kStored;
  constexpr int kWays = kSparse || Tokens == 1 ? 2 : 1;
  const int kept = Form == kNof8 ? kept_of_8(p.form) : 4;
  const int half = kSparse ? 128 * kept + 64 : 1024;  // bytes
  __m512 sums[2][Tokens][kWays];  // sparse: rows 0 to 7 and 8 to 15 of a half, two lanes a row
#pragma GCC unroll 32
  for (int i = 0; i < 2 * Tokens * kWays; ++i) sums[i % 2][i / 2 % Tokens][i / 2 / Tokens] = __m512{};
  const uint8_t* x = p.x + token * p.x_stride;
  for (int64_t block = 0; block < p.blocks; ++block, w += 2 * half, x += 2 * kBlockInputs) {
    prefetch(w, 2 * half);
#pragma GCC unroll 16
    for (int unit = 0; unit < 16; ++unit) {
      __m512i rows[2];
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const uint8_t* at = w + side * half;
        if constexpr (kSparse) rows[side] = bf16_sparse_unit<Form>(at, kept, unit);
        else rows[side] = _mm512_load_si512(at + 64 * unit);
      }
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        const uint8_t* at = x + t * p.x_stride;
        const __m512bh inputs = (__m512bh)(kSparse ? broadcast8(at + unit / 2 * 8) : broadcast4(at + 4 * unit));
        __m512 &low = sums[0][t][unit % kWays], &high = sums[1][t][unit % kWays];
        low = _mm512_dpbf16_ps(low, inputs, (__m512bh)rows[0]);
        high = _mm512_dpbf16_ps(high, inputs, (__m512bh)rows[1]);
      }
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 2
  for (int side = 0; side < 2; ++side)
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
      const __m512 a = sums[side][t][0], b = sums[side][t][kWays - 1];
      __m512 sum = kWays == 1 ? a : _mm512_add_ps(a, b);
      if constexpr (kSparse)
        sum = _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
      finish(p, tile * kTileRows + side * kHalfRows, token + t, sum);
    }
}

template <Zeros Form, int Tokens>
struct Int8 {
  static constexpr int kUnits = 8;
  static void run(const Product& p, const uint8_t* w, int64_t tile, int64_t token) {
    int8_product<Form, Tokens>(p, w, tile, token);
  }
  static __m512i unit(const uint8_t* half, int kept, int i) { return int8_unit<Form>(half, kept, i); }
};

template <Zeros Form, int Tokens>
struct Bf16 {  // sparse forms take two registers a sum, so half as many tokens at once
  static constexpr int kUnits = 16;
  static void run(const Product& p, const uint8_t* w, int64_t tile, int64_t token) {
    if constexpr (Form != kStored && Tokens > 6) {
      bf16_product<Form, Tokens / 2>(p, w, tile, token);
      bf16_product<Form, Tokens / 2>(p, w, tile, token + Tokens / 2);
    } else {
      bf16_product<Form, Tokens>(p, w, tile, token);
    }
  }
  // Unit i of a dense half from a sparse one: inputs 2i and 2i + 1 of 16 rows.
  static __m512i unit(const uint8_t* half, int kept, int i) {
    const __m512i low = bf16_sparse_unit<Form>(half, kept, i / 2 * 2);
    const __m512i high = bf16_sparse_unit<Form>(half, kept, i / 2 * 2 + 1);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_permutex2var_epi32(low, i % 2 ? odd : even, high);
  }
};

// All tokens of a tile, as many at once as registers allow.
template <template <Zeros, int> class Step, Zeros Form>
void all_tokens_of(const Product& p, const uint8_t* w, int64_t tile) {
  int64_t token = 0;
  for (; p.tokens - token >= 12; token += 12) Step<Form, 12>::run(p, w, tile, token);
  for (; p.tokens - token >= 8; token += 8) Step<Form, 8>::run(p, w, tile, token);
  for (; p.tokens - token >= 4; token += 4) Step<Form, 4>::run(p, w, tile, token);
  for (; p.tokens - token >= 2; token += 2) Step<Form, 2>::run(p, w, tile, token);
  if (token < p.tokens) Step<Form, 1>::run(p, w, tile, token);
}

// Above so many tokens a sparse tile is expanded once, into the cache, and multiplied as a dense one.
constexpr int64_t kExpandedFrom = 24;

template <template <Zeros, int> class Step, Zeros Form>
const uint8_t* expand_tile(const Product& p, const uint8_t* w, Scratch& scratch) {
  constexpr int kUnits = Step<Form, 1>::kUnits;
  const int64_t halves = 2 * p.blocks, half = half_bytes(p.form);
  const int kept = Form == kNof8 ? kept_of_8(p.form) : 4;
  uint8_t* dense = scratch.bytes(halves * kUnits * 64 + kAhead);
  for (int64_t i = 0; i < halves; ++i, w += half)
    for (int unit = 0; unit < kUnits; ++unit)
      _mm512_store_si512(dense + (i * kUnits + unit) * 64, Step<Form, 1>::unit(w, kept, unit));
  return dense;
}

template <template <Zeros, int> class Step, Zeros Form>
void all_tokens(const Product& p, int64_t first, int64_t tiles) {
  static thread_local Scratch scratch;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    const uint8_t* w = p.weight + tile * p.tile_bytes;
    if constexpr (Form != kStored) {
      if (p.tokens >= kExpandedFrom) {
        all_tokens_of<Step, kStored>(p, expand_tile<Step, Form>(p, w, scratch), tile);
        continue;
      }
    }
    all_tokens_of<Step, Form>(p, w, tile);
  }
}

}  // namespace

const Kernels kAvx512 = {{all_tokens<Int8, kStored>, all_tokens<Int8, k2of4>, all_tokens<Int8, kNof8>},
                         {all_tokens<Bf16, kStored>, all_tokens<Bf16, k2of4>, all_tokens<Bf16, kNof8>}};

}  // namespace twofour_cpu
#pragma GCC pop_options
#endif
