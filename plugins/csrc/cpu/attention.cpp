// Causal attention of prompts, on the kernels of the products: one head's keys are packed as a weight [keys, head_dim]
// that its queries are multiplied by, its values as a weight [head_dim, keys] that the probabilities are multiplied by.
// Numbers are rounded as torch's flash attention rounds them: scores and sums in float32, probabilities to bfloat16.
#include <math.h>

#include <algorithm>

#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace twofour_cpu {
namespace {

constexpr int64_t kQueries = 32;  // that a thread takes at once
constexpr int64_t kBlockBytes = 2 * half_bytes(TWOFOUR_CPU_BF16);
constexpr int kUnits = kBlockInputs / 2;

// Where one head of one sequence lies: rows of head_dim numbers, `stride` elements apart.
struct Rows {
  const uint16_t* data;
  int64_t stride, count;

  const uint16_t* row(int64_t i) const { return data + i * stride; }
};

Rows rows_of(const void* data, const int64_t* strides, int64_t sequence, int64_t head, int64_t count) {
  return {static_cast<const uint16_t*>(data) + sequence * strides[0] + head * strides[1], strides[2], count};
}

// One block of 32 rows x 32 inputs: `word(row, unit)` gives inputs 2 unit and 2 unit + 1 of a row.
template <class Word>
inline uint32_t* pack_block(uint32_t* packed, const Word& word) {
  for (int half = 0; half < 2; ++half)
    for (int unit = 0; unit < kUnits; ++unit)
      for (int row = 0; row < kHalfRows; ++row) *packed++ = word(half * kHalfRows + row, unit);
  return packed;
}

void pack_keys(const Rows& keys, int64_t dim, uint8_t* packed) {
  uint32_t* out = reinterpret_cast<uint32_t*>(packed);
  for (int64_t tile = 0; tile < tiles_of(keys.count); ++tile)
    for (int64_t block = 0; block < blocks_of(dim); ++block)
      out = pack_block(out, [&](int row, int unit) {
        const int64_t key = tile * kTileRows + row;
        uint32_t word = 0;
        if (key < keys.count) memcpy(&word, keys.row(key) + block * kBlockInputs + 2 * unit, 4);
        return word;
      });
}

void pack_values(const Rows& values, int64_t dim, uint8_t* packed) {
  uint32_t* out = reinterpret_cast<uint32_t*>(packed);
  for (int64_t tile = 0; tile < tiles_of(dim); ++tile)
    for (int64_t block = 0; block < blocks_of(values.count); ++block)
      out = pack_block(out, [&](int row, int unit) {
        const int64_t key = block * kBlockInputs + 2 * unit, channel = tile * kTileRows + row;
        const uint32_t low = key < values.count ? values.row(key)[channel] : 0;
        const uint32_t high = key + 1 < values.count ? values.row(key + 1)[channel] : 0;
        return low | high << 16;
      });
}

// Probabilities of keys [begin, end) of one query, times their sum, which is returned; zeros up to `padded`. All three
// count from the first key whose score is at `scores`.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
float exponentiate(float* scores, int64_t begin, int64_t end, int64_t padded, uint16_t* probabilities) {
  const int64_t last = (end + kLanes - 1) / kLanes * kLanes;
  std::fill(scores, scores + begin, -INFINITY);
  std::fill(scores + end, scores + last, -INFINITY);
  Floats most = all(-INFINITY), total{};
  for (int64_t i = 0; i < last; i += kLanes) most = larger(most, load(scores + i));
  const float peak = largest(most);
  for (int64_t i = 0; i < last; i += kLanes) {
    const Floats at = load(scores + i), weight = at == -INFINITY ? Floats{} : exponential(at - peak);
    store(probabilities + i, weight);
    total += weight;
  }
  std::fill(probabilities + last, probabilities + padded, uint16_t{0});
  return sum(total);
}

// Queries `first` to `first + count - 1` of one head.
void attend(const twofour_cpu_attention& a, const Rows& queries, int64_t first, int64_t count, const uint8_t* keys,
            const uint8_t* values, uint16_t* out) {
  const int64_t position = a.keys - a.queries + first;
  const int64_t begin = a.window ? std::max<int64_t>(0, position - a.window + 1) / kTileRows : 0;
  const int64_t tiles = tiles_of(position + count) - begin, width = tiles * kTileRows, origin = begin * kTileRows;
  static thread_local Scratch scratch;
  float* const scores = reinterpret_cast<float*>(scratch.bytes(kQueries * (width * 6 + 64)));
  uint16_t* const probabilities = reinterpret_cast<uint16_t*>(scores + kQueries * width);
  float inverse[kQueries];

  Product score{};
  score.form = TWOFOUR_CPU_BF16, score.rows = a.keys, score.tokens = count, score.blocks = blocks_of(a.head_dim);
  score.tile_bytes = tile_bytes(TWOFOUR_CPU_BF16, a.head_dim), score.weight = keys, score.scale = a.scale;
  score.x = reinterpret_cast<const uint8_t*>(queries.row(first)), score.x_stride = 2 * queries.stride;
  score.y = scores - origin, score.y_stride = width, score.y_type = TWOFOUR_CPU_FLOAT32;
  kernel_for(TWOFOUR_CPU_BF16)(score, begin, tiles);

  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = a.window ? std::max<int64_t>(0, position + i - a.window + 1) - origin : 0;
    const float total =
        exponentiate(scores + i * width, from, position + i + 1 - origin, width, probabilities + i * width);
    inverse[i] = a.v_scale / total;
  }

  Product mix{};
  mix.form = TWOFOUR_CPU_BF16, mix.rows = a.head_dim, mix.tokens = count, mix.blocks = tiles;
  mix.tile_bytes = tile_bytes(TWOFOUR_CPU_BF16, a.keys), mix.weight = values + begin * kBlockBytes, mix.scale = 1.f;
  mix.x = reinterpret_cast<const uint8_t*>(probabilities), mix.x_stride = 2 * width, mix.token_scales = inverse;
  mix.y = out, mix.y_stride = a.heads * a.head_dim, mix.y_type = TWOFOUR_CPU_BFLOAT16;
  kernel_for(TWOFOUR_CPU_BF16)(mix, 0, tiles_of(a.head_dim));
}

}  // namespace

void attend_prompts(const twofour_cpu_attention& a) {
  static thread_local Scratch scratch;
  const int64_t key_bytes = packed_bytes(TWOFOUR_CPU_BF16, a.keys, a.head_dim);
  const int64_t value_bytes = packed_bytes(TWOFOUR_CPU_BF16, a.head_dim, a.keys), heads = a.sequences * a.kv_heads;
  uint8_t* const keys = scratch.bytes(heads * (key_bytes + value_bytes));
  uint8_t* const values = keys + heads * key_bytes;
  parallel(2 * heads, [&](int64_t item) {
    const int64_t at = item / 2, sequence = at / a.kv_heads, head = at % a.kv_heads;
    if (item % 2) pack_values(rows_of(a.v, a.v_strides, sequence, head, a.keys), a.head_dim, values + at * value_bytes);
    else pack_keys(rows_of(a.k, a.k_strides, sequence, head, a.keys), a.head_dim, keys + at * key_bytes);
  });
  const int64_t parts = ceil_div(a.queries, kQueries), group = a.heads / a.kv_heads;
  parallel(a.sequences * a.heads * parts, [&](int64_t item) {
    const int64_t part = parts - 1 - item / (a.sequences * a.heads);  // the longest first
    const int64_t sequence = item % (a.sequences * a.heads) / a.heads, head = item % a.heads;
    const int64_t first = part * kQueries, at = sequence * a.kv_heads + head / group;
    uint16_t* const out = static_cast<uint16_t*>(a.out) + ((sequence * a.queries + first) * a.heads + head) * a.head_dim;
    attend(a, rows_of(a.q, a.q_strides, sequence, head, a.queries), first, std::min(kQueries, a.queries - first),
           keys + at * key_bytes, values + at * value_bytes, out);
  });
}

}  // namespace twofour_cpu
