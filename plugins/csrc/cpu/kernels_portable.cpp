// Plain C++: what runs where a processor has no AVX2, and what the others are tested against.
#include "elementwise.h"
#include "kernels.h"

namespace twofour_cpu {
namespace {

// y of one token and one tile from its sums.
template <class Sum>
void finish(const Product& p, int64_t tile, int64_t token, const Sum* sums) {
  for (int row = 0; row < kTileRows; ++row) {
    const int64_t at = tile * kTileRows + row;
    if (at >= p.rows) return;
    float value = static_cast<float>(sums[row]);
    if (p.scales || p.scale != 1.f) value *= p.scales ? p.scales[at] : p.scale;
    if (p.token_scales) value *= p.token_scales[token];
    if (p.bias) value += p.bias[at];
    if (p.y_type == TWOFOUR_CPU_FLOAT32) static_cast<float*>(p.y)[token * p.y_stride + at] = value;
    else static_cast<uint16_t*>(p.y)[token * p.y_stride + at] = to_bf16(value);
  }
}

// The elements of one half of a block, zeros put back.
template <class Element>
const Element* expand(int form, const uint8_t* half, Element* buffer) {
  if (is_dense(form)) return reinterpret_cast<const Element*>(half);
  const Element* next = reinterpret_cast<const Element*>(half);
  const uint8_t* masks = half + masks_at(form);
  for (int i = 0; i < kHalfElements; ++i) {
    const int keep = masks[i / 8] >> (i % 8) & 1;
    buffer[i] = keep ? *next : Element{0};
    next += keep;
  }
  return buffer;
}

// These add one half of a block to the sums of its rows.
void add_int8(int form, const uint8_t* half, const uint8_t* x, int32_t* sums) {
  int8_t buffer[kHalfElements];
  const int8_t* w = expand(form, half, buffer);
  for (int unit = 0; unit < kBlockInputs / 4; ++unit)
    for (int row = 0; row < kHalfRows; ++row)
      for (int i = 0; i < 4; ++i) sums[row] += w[unit * 64 + 4 * row + i] * x[4 * unit + i];
}

void add_bf16(int form, const uint8_t* half, const uint8_t* x_bytes, float* sums) {
  uint16_t buffer[kHalfElements];
  const uint16_t *w = expand(form, half, buffer), *x = reinterpret_cast<const uint16_t*>(x_bytes);
  const int inputs = form == TWOFOUR_CPU_BF16 ? 2 : 4, rows = form == TWOFOUR_CPU_BF16 ? kHalfRows : 8;
  for (int i = 0; i < kHalfElements; ++i) {
    const int unit = i / (inputs * rows), within = i % (inputs * rows), parts = kHalfRows / rows;
    const int row = unit % parts * rows + within / inputs, input = unit / parts * inputs + within % inputs;
    sums[row] += widen(w[i]) * widen(x[input]);
  }
}

template <class Sum, int InputBytes, void (*Add)(int, const uint8_t*, const uint8_t*, Sum*)>
void all_tokens(const Product& p, int64_t first, int64_t tiles) {
  for (int64_t tile = first; tile < first + tiles; ++tile)
    for (int64_t token = 0; token < p.tokens; ++token) {
      Sum sums[kTileRows] = {};
      for (int64_t block = 0; block < p.blocks; ++block)
        for (int half = 0; half < 2; ++half) {
          const uint8_t* w = p.weight + tile * p.tile_bytes + (2 * block + half) * half_bytes(p.form);
          Add(p.form, w, p.x + token * p.x_stride + block * kBlockInputs * InputBytes, sums + half * kHalfRows);
        }
      if (is_int8(p.form))
        for (int row = 0; row < kTileRows; ++row) sums[row] -= static_cast<Sum>(p.offsets[tile * kTileRows + row]);
      finish(p, tile, token, sums);
    }
}

constexpr Kernel kInt8 = all_tokens<int32_t, 1, add_int8>, kBf16 = all_tokens<float, 2, add_bf16>;

}  // namespace

const Kernels kPortable = {{kInt8, kInt8, kInt8}, {kBf16, kBf16, kBf16}};

}  // namespace twofour_cpu
