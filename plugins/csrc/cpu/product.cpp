#include "product.h"

#include <string.h>

#include <algorithm>

#include "elementwise.h"
#include "threads.h"

namespace twofour_cpu {
namespace {

constexpr int kMostLayers = 8;           // of one input
constexpr int kMostParts = 2 * kMostLayers;
constexpr int64_t kChunkBytes = 16384;   // of weight, at least, that a thread takes at once
constexpr int64_t kChunksOfThread = 12;  // about
constexpr int64_t kParallelElements = 32768;  // inputs from which on quantizing is shared

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi2"))
    return TWOFOUR_CPU_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return TWOFOUR_CPU_AVX2;
#endif
  return TWOFOUR_CPU_PORTABLE;
}

int isa = best_isa();

bool processor_has_bf16() {
#if defined(__x86_64__)
  static const bool has = best_isa() == TWOFOUR_CPU_AVX512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

}  // namespace

Kernel kernel_for(int form) {
#if defined(__x86_64__)
  if (isa == TWOFOUR_CPU_AVX512 && (is_int8(form) || has_bf16())) return kAvx512.of(form);
  if (isa >= TWOFOUR_CPU_AVX2) return kAvx2.of(form);
#endif
  return kPortable.of(form);
}

namespace {

// A layer, or one of its two parts: what it reads of x and writes of y, whose rows have other parts' elements too.
struct Part {
  const twofour_cpu_linear* linear;
  const void* x;
  int64_t x_width;  // elements of a row
  void* y;
  int64_t y_width;
};

Product describe(const twofour_cpu_linear& linear, int64_t tokens, const Quantized& x, int type, void* y,
                 int64_t y_width) {
  const int form = linear.form;
  const int64_t n = linear.out_features, k = linear.in_features;
  const uint8_t* weight = static_cast<const uint8_t*>(linear.weight);
  Product p{};
  p.form = form, p.rows = n, p.tokens = tokens, p.blocks = blocks_of(k), p.tile_bytes = tile_bytes(form, k);
  p.weight = weight;
  if (is_int8(form)) {
    p.offsets = reinterpret_cast<const int32_t*>(weight + offsets_at(form, n, k));
    p.holds_lowest = weight[lowest_at(form, n, k)] != 0;
  }
  p.scales = linear.scales, p.scale = linear.scale, p.token_scales = x.token_scales, p.bias = linear.bias;
  p.x = x.q, p.x_stride = x.stride, p.y = y, p.y_stride = y_width, p.y_type = type;
  return p;
}

// Rows of several products, as one list of chunks.
void run(const Product* products, int count) {
  int64_t chunks_before[kMostParts + 1] = {0}, tiles_of_chunk[kMostParts];
  for (int i = 0; i < count; ++i) {
    const Product& p = products[i];
    const int64_t tiles = tiles_of(p.rows);
    const int64_t wanted = ceil_div(tiles * count, kChunksOfThread * threads());
    const int64_t step = std::max(wanted, ceil_div(kChunkBytes, p.tile_bytes * std::min<int64_t>(p.tokens, 16)));
    tiles_of_chunk[i] = step;
    chunks_before[i + 1] = chunks_before[i] + ceil_div(tiles, step);
  }
  parallel(chunks_before[count], [&](int64_t chunk) {
    int i = 0;
    while (chunk >= chunks_before[i + 1]) ++i;
    const Product& p = products[i];
    const int64_t first = (chunk - chunks_before[i]) * tiles_of_chunk[i];
    kernel_for(p.form)(p, first, std::min(tiles_of_chunk[i], tiles_of(p.rows) - first));
  });
}

bool quantize_alike(const Part& one, const Part& other) {
  const twofour_cpu_linear &a = *one.linear, &b = *other.linear;
  if (one.x != other.x || a.in_features != b.in_features || a.rounding != b.rounding ||
      is_int8(a.form) != is_int8(b.form) || a.multipliers != b.multipliers)
    return false;
  return a.multiplier == b.multiplier || memcmp(a.multiplier, b.multiplier, a.multipliers * sizeof(float)) == 0;
}

void add_rows(float* y, const float* more, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += more[i];
}
void add_rows(uint16_t* y, const uint16_t* more, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = to_bf16(widen(y[i]) + widen(more[i]));
}

}  // namespace

int isa_in_use() { return isa; }
bool has_bf16() { return isa == TWOFOUR_CPU_AVX512 && processor_has_bf16(); }
bool use_isa(int wanted) {
  if (wanted < 0 || wanted > best_isa()) return false;
  isa = wanted;
  return true;
}

// One token's inputs as the kernels read them; returns its scale where it has one of its own.
static float round_token(const Part& part, int type, int64_t token, uint8_t* q) {
  const twofour_cpu_linear& linear = *part.linear;
  const int64_t k = linear.in_features, padded = blocks_of(k) * kBlockInputs;
  const uint16_t* half = static_cast<const uint16_t*>(part.x) + token * part.x_width;
  const float* full = static_cast<const float*>(part.x) + token * part.x_width;
  bool bf16 = type == TWOFOUR_CPU_BFLOAT16;
  const float* multiplier = linear.multiplier;
  int64_t multipliers = linear.multipliers;
  float largest = 0, own = 0;
  if (linear.rounding == TWOFOUR_CPU_EACH_TOKEN) {
    if (multiplier) {
      static thread_local Scratch scratch;
      float* smoothed = reinterpret_cast<float*>(scratch.bytes(k * sizeof(float)));
      if (bf16) multiply_bf16(half, k, multiplier, multipliers, smoothed);
      else multiply_float(full, k, multiplier, multipliers, smoothed);
      full = smoothed, bf16 = false;
    }
    largest = bf16 ? largest_bf16(half, k) : largest_float(full, k);
    own = largest > 0 ? 127.f / largest : 0.f;
    multiplier = &own, multipliers = 1;
  }
  if (is_int8(linear.form)) {
    if (bf16) quantize_bf16(half, k, multiplier, multipliers, q);
    else quantize_float(full, k, multiplier, multipliers, q);
    return largest / 127.f;
  }
  uint16_t* wide = reinterpret_cast<uint16_t*>(q);
  if (linear.rounding == TWOFOUR_CPU_AS_IS) memcpy(wide, half, 2 * k);
  else if (bf16) round_to_fp8_bf16(half, k, multiplier, multipliers, wide);
  else round_to_fp8_float(full, k, multiplier, multipliers, wide);
  memset(wide + k, 0, 2 * (padded - k));  // anything times a zero weight, but no infinity
  return 0;
}

static Quantized quantize(const Part& part, int64_t tokens, int type, Scratch& scratch) {
  const twofour_cpu_linear& linear = *part.linear;
  const int64_t k = linear.in_features, stride = blocks_of(k) * kBlockInputs * (is_int8(linear.form) ? 1 : 2);
  if (linear.rounding == TWOFOUR_CPU_AS_IS && stride == 2 * k)
    return {static_cast<const uint8_t*>(part.x), 2 * part.x_width, nullptr};
  const bool own_scales = linear.rounding == TWOFOUR_CPU_EACH_TOKEN;
  const int64_t scales_bytes = own_scales ? ceil_div(tokens * sizeof(float), 64) * 64 : 0;
  uint8_t* memory = scratch.bytes(scales_bytes + tokens * stride);
  float* scales = reinterpret_cast<float*>(memory);
  const auto one = [&](int64_t token) {
    const float scale = round_token(part, type, token, memory + scales_bytes + token * stride);
    if (own_scales) scales[token] = scale;
  };
  if (tokens * k < kParallelElements) {
    for (int64_t token = 0; token < tokens; ++token) one(token);
  } else {
    const int64_t step = ceil_div(kParallelElements / 4, k);
    parallel(ceil_div(tokens, step), [&](int64_t chunk) {
      for (int64_t token = chunk * step; token < std::min(tokens, (chunk + 1) * step); ++token) one(token);
    });
  }
  return {memory + scales_bytes, stride, own_scales ? scales : nullptr};
}

void apply_quantized(const twofour_cpu_linear& linear, int64_t tokens, const Quantized& x, int type, void* y) {
  const Product product = describe(linear, tokens, x, type, y, linear.out_features);
  run(&product, 1);
}

// The parts of `linear`; the second of two whose products are summed writes to `sum`.
static int parts_of(const twofour_cpu_linear& linear, int64_t tokens, int type, const void* x, void* y, Scratch& sum,
                    Part* parts) {
  const int64_t size = type == TWOFOUR_CPU_BFLOAT16 ? 2 : 4, n = linear.out_features, k = linear.in_features;
  if (!linear.rest) {
    parts[0] = {&linear, x, k, y, n};
    return 1;
  }
  const twofour_cpu_linear& rest = *linear.rest;
  if (linear.axis == TWOFOUR_CPU_ROWS) {
    const int64_t width = n + rest.out_features;
    parts[0] = {&linear, x, k, y, width};
    parts[1] = {&rest, x, k, static_cast<uint8_t*>(y) + n * size, width};
  } else {
    const int64_t width = k + rest.in_features;
    parts[0] = {&linear, x, width, y, n};
    parts[1] = {&rest, static_cast<const uint8_t*>(x) + k * size, width, sum.bytes(tokens * n * size), n};
  }
  return 2;
}

void apply(const twofour_cpu_linear* const* linears, int count, int64_t tokens, int type, const void* x,
           void* const* y) {
  static thread_local Scratch scratches[kMostParts], sums[kMostLayers];
  for (int first = 0; first < count; first += kMostLayers) {
    const int here = std::min(kMostLayers, count - first);
    Part parts[kMostParts];
    Product products[kMostParts];
    Quantized inputs[kMostParts];
    int total = 0;
    for (int i = 0; i < here; ++i)
      total += parts_of(*linears[first + i], tokens, type, x, y[first + i], sums[i], parts + total);
    for (int i = 0; i < total; ++i) {
      int same = 0;
      while (same < i && !quantize_alike(parts[same], parts[i])) ++same;
      inputs[i] = same < i ? inputs[same] : quantize(parts[i], tokens, type, scratches[i]);
      products[i] = describe(*parts[i].linear, tokens, inputs[i], type, parts[i].y, parts[i].y_width);
    }
    run(products, total);
    for (int i = 0; i < here; ++i) {
      const twofour_cpu_linear& linear = *linears[first + i];
      if (!linear.rest || linear.axis == TWOFOUR_CPU_ROWS) continue;
      const int64_t elements = tokens * linear.out_features;
      void *const into = y[first + i], *const more = sums[i].bytes(0);
      if (type == TWOFOUR_CPU_BFLOAT16) add_rows(static_cast<uint16_t*>(into), static_cast<uint16_t*>(more), elements);
      else add_rows(static_cast<float*>(into), static_cast<float*>(more), elements);
    }
  }
}

}  // namespace twofour_cpu
