#include "layout.h"

#include <string.h>

#include <memory>

namespace twofour_cpu {
namespace {

constexpr int inputs_of_unit(int form) { return form == TWOFOUR_CPU_BF16 ? 2 : 4; }
constexpr int rows_of_unit(int form) { return form == TWOFOUR_CPU_BF16_2OF4 ? 8 : kHalfRows; }
constexpr int kElements = kHalfRows * kBlockInputs;  // of a half

// Where element (row, input) of a half lies before zeros are left out.
constexpr int place(int form, int row, int input) {
  const int inputs = inputs_of_unit(form), rows = rows_of_unit(form);
  const int unit = input / inputs * (kHalfRows / rows) + row / rows;
  return unit * inputs * rows + row % rows * inputs + input % inputs;
}

// A row of a 2:4 weight as its dense elements, from its kept values and their indices.
template <class Element>
void expand_row(const Element* values, const uint8_t* indices, int64_t inputs, Element* row, uint8_t* kept) {
  for (int64_t group = 0; group < inputs / 4; ++group) {
    const int code = indices[group / 2] >> (group % 2 * 4) & 15;
    const int first = code & 3, second = code >> 2;
    row[4 * group + first] = values[2 * group], row[4 * group + second] = values[2 * group + 1];
    kept[4 * group + first] = kept[4 * group + second] = 1;
  }
}

// One half from 16 dense rows, `stride` elements apart, and from `kept` which of their elements a 2:4 form keeps.
template <class Element>
void pack_half(int form, const Element* rows, const uint8_t* kept, int64_t stride, uint8_t* half) {
  Element elements[kElements];
  uint8_t keep[kElements];
  for (int row = 0; row < kHalfRows; ++row)
    for (int input = 0; input < kBlockInputs; ++input) {
      const int at = place(form, row, input);
      elements[at] = rows[row * stride + input], keep[at] = kept[row * stride + input];
    }
  if (!is_2of4(form)) {
    memcpy(half, elements, sizeof(elements));
    return;
  }
  Element* target = reinterpret_cast<Element*>(half);
  uint8_t* masks = half + kElements / 2 * sizeof(Element);
  memset(masks, 0, kElements / 8);
  for (int i = 0; i < kElements; ++i)
    if (keep[i]) *target++ = elements[i], masks[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
}

template <class Element>
void pack_typed(int form, int64_t n, int64_t k, const Element* values, const uint8_t* indices, uint8_t* packed) {
  const int64_t padded = blocks_of(k) * kBlockInputs, halves = 2 * blocks_of(k);
  const auto dense = std::make_unique<Element[]>(kTileRows * padded);
  const auto kept = std::make_unique<uint8_t[]>(kTileRows * padded);
  int32_t* offsets = reinterpret_cast<int32_t*>(packed + offsets_at(form, n, k));
  bool lowest = false;
  for (int64_t tile = 0; tile < tiles_of(n); ++tile) {
    memset(dense.get(), 0, kTileRows * padded * sizeof(Element));
    memset(kept.get(), 0, kTileRows * padded);
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t at = tile * kTileRows + row;
      Element* target = dense.get() + row * padded;
      uint8_t* keep = kept.get() + row * padded;
      if (at < n && is_2of4(form)) expand_row(values + at * (k / 2), indices + at * ceil_div(k, 8), k, target, keep);
      else if (at < n) memcpy(target, values + at * k, k * sizeof(Element));
      for (int64_t input = at < n ? k : 0; input < padded; ++input) keep[input] = input % 4 < 2;  // of zeros
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
  Element elements[kElements];
  for (int64_t i = 0; i < tiles_of(n) * 2 * blocks_of(k); ++i) {
    const uint8_t* half = packed + i * half_bytes(form);
    if (is_2of4(form)) {
      const Element* next = reinterpret_cast<const Element*>(half);
      const uint8_t* masks = half + kElements / 2 * sizeof(Element);
      for (int j = 0; j < kElements; ++j) elements[j] = masks[j / 8] >> (j % 8) & 1 ? *next++ : Element{0};
    } else {
      memcpy(elements, half, sizeof(elements));
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

void pack(int form, int64_t rows, int64_t inputs, const void* values, const uint8_t* indices, uint8_t* packed) {
  if (is_int8(form)) pack_typed(form, rows, inputs, static_cast<const int8_t*>(values), indices, packed);
  else pack_typed(form, rows, inputs, static_cast<const uint16_t*>(values), indices, packed);
}

void unpack(int form, int64_t rows, int64_t inputs, const uint8_t* packed, void* weight) {
  if (is_int8(form)) unpack_typed(form, rows, inputs, packed, static_cast<int8_t*>(weight));
  else unpack_typed(form, rows, inputs, packed, static_cast<uint16_t*>(weight));
}

}  // namespace twofour_cpu
