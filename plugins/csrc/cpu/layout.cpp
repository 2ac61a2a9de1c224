#include "layout.h"

#include <string.h>

#include <memory>

namespace twofour_cpu {
namespace {

constexpr int inputs_of_unit(int form) { return form == TWOFOUR_CPU_BF16 ? 2 : 4; }
constexpr int rows_of_unit(int form) { return is_int8(form) || is_dense(form) ? kHalfRows : 8; }

// Where element (row, input) of a half lies before zeros are left out.
constexpr int place(int form, int row, int input) {
  const int inputs = inputs_of_unit(form), rows = rows_of_unit(form);
  const int unit = input / inputs * (kHalfRows / rows) + row / rows;
  return unit * inputs * rows + row % rows * inputs + input % inputs;
}

// A row of a sparse weight as its dense elements, from its kept values and their positions.
template <class Element>
void expand_row(int form, const Element* values, const uint8_t* positions, int64_t inputs, Element* row, uint8_t* kept) {
  for (int64_t group = 0; is_2of4(form) && group < inputs / 4; ++group) {
    const int code = positions[group / 2] >> (group % 2 * 4) & 15;
    kept[4 * group + (code & 3)] = kept[4 * group + (code >> 2)] = 1;
  }
  for (int64_t input = 0; input < inputs; ++input) {
    if (!is_2of4(form)) kept[input] = positions[input / 8] >> (input % 8) & 1;
    if (kept[input]) row[input] = *values++;
  }
}

// One half from 16 dense rows, `stride` elements apart, and from `kept` which of their elements a sparse form keeps.
template <class Element>
void pack_half(int form, const Element* rows, const uint8_t* kept, int64_t stride, uint8_t* half) {
  Element elements[kHalfElements];
  uint8_t keep[kHalfElements];
  for (int row = 0; row < kHalfRows; ++row)
    for (int input = 0; input < kBlockInputs; ++input) {
      const int at = place(form, row, input);
      elements[at] = rows[row * stride + input], keep[at] = kept[row * stride + input];
    }
  if (is_dense(form)) {
    memcpy(half, elements, sizeof(elements));
    return;
  }
  Element* target = reinterpret_cast<Element*>(half);
  uint8_t* masks = half + masks_at(form);
  memset(masks, 0, kHalfElements / 8);
  for (int i = 0; i < kHalfElements; ++i)
    if (keep[i]) *target++ = elements[i], masks[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
}

template <class Element>
void pack_typed(int form, int64_t n, int64_t k, const Element* values, const uint8_t* positions, uint8_t* packed) {
  const int64_t padded = blocks_of(k) * kBlockInputs, halves = 2 * blocks_of(k);
  const auto dense = std::make_unique<Element[]>(kTileRows * padded);
  const auto kept = std::make_unique<uint8_t[]>(kTileRows * padded);
  const int64_t kept_of_row = k * kept_of_8(form) / 8;
  int32_t* offsets = reinterpret_cast<int32_t*>(packed + offsets_at(form, n, k));
  bool lowest = false;
  for (int64_t tile = 0; tile < tiles_of(n); ++tile) {
    memset(dense.get(), 0, kTileRows * padded * sizeof(Element));
    memset(kept.get(), 0, kTileRows * padded);
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t at = tile * kTileRows + row;
      Element* target = dense.get() + row * padded;
      uint8_t* keep = kept.get() + row * padded;
      const Element* source = values + at * kept_of_row;
      if (at < n && is_dense(form)) memcpy(target, source, k * sizeof(Element));
      else if (at < n) expand_row(form, source, positions + at * ceil_div(k, 8), k, target, keep);
      for (int64_t input = at < n ? k : 0; input < padded; ++input)
        keep[input] = input % group_inputs(form) < kept_of_group(form);  // of zeros
      if constexpr (sizeof(Element) == 1) {
        int32_t sum = 0;
        for (int64_t input = 0; input < k; ++input) sum += target[input], lowest |= target[input] == -128;
        offsets[at] = kInt8Offset * sum;
      }
    }
    for (int64_t i = 0; i < halves; ++i) {
      const int64_t first = i % 2 * kHalfRows * padded + i / 2 * kBlockInputs;
      pack_half(form, &dense[first], &kept[first], padded, packed + (tile * halves + i) * half_bytes(form));
    }
  }
  if (is_int8(form)) memset(packed + lowest_at(form, n, k), lowest ? 1 : 0, 64);
}

template <class Element>
void unpack_typed(int form, int64_t n, int64_t k, const uint8_t* packed, Element* weight) {
  Element elements[kHalfElements];
  for (int64_t i = 0; i < tiles_of(n) * 2 * blocks_of(k); ++i) {
    const uint8_t* half = packed + i * half_bytes(form);
    if (is_dense(form)) {
      memcpy(elements, half, sizeof(elements));
    } else {
      const Element* next = reinterpret_cast<const Element*>(half);
      const uint8_t* masks = half + masks_at(form);
      for (int j = 0; j < kHalfElements; ++j) elements[j] = masks[j / 8] >> (j % 8) & 1 ? *next++ : Element{0};
    }
    const int64_t tile = i / (2 * blocks_of(k)), block = i / 2 % blocks_of(k);
    for (int row = 0; row < kHalfRows; ++row)
      for (int input = 0; input < kBlockInputs; ++input) {
        const int64_t at_row = tile * kTileRows + i % 2 * kHalfRows + row, at_input = block * kBlockInputs + input;
        if (at_row < n && at_input < k) weight[at_row * k + at_input] = elements[place(form, row, input)];
      }
  }
}

}  // namespace

void pack(int form, int64_t rows, int64_t inputs, const void* values, const uint8_t* positions, uint8_t* packed) {
  if (is_int8(form)) pack_typed(form, rows, inputs, static_cast<const int8_t*>(values), positions, packed);
  else pack_typed(form, rows, inputs, static_cast<const uint16_t*>(values), positions, packed);
}

void unpack(int form, int64_t rows, int64_t inputs, const uint8_t* packed, void* weight) {
  if (is_int8(form)) unpack_typed(form, rows, inputs, packed, static_cast<int8_t*>(weight));
  else unpack_typed(form, rows, inputs, packed, static_cast<uint16_t*>(weight));
}

}  // namespace twofour_cpu
