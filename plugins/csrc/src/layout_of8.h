// The packed form of a weight in the pattern 4:8, 5:8 or 6:8: n values of each group of 8 inputs, and a bit for each input;
// and that of a dense weight, which keeps all 8 and has no bits.
//
// The kernel expands a group in registers and multiplies it by a dense mma (m16n8k32 for int8, m16n8k16 for 16 bit and
// for fp8 widened to fp16). With g = lane / 4 and t = lane % 4, register j of A holds row g + 8 (j & 1); its columns are
// slots of K, which a product may order at will where x is ordered alike. So a lane holds whole groups. Of the 16 groups
// of a lane in a block, four belong to each unit of 64 inputs, numbered j: row g + 8 (j & 1), and inputs
//   int8:              16 t + 8 (j / 2) to +7: both lie in the 16 bytes of x that the lane reads for the unit
//   fp16, bf16, fp8:   32 (j / 2) + 8 t to +7: 16 bytes of x, 8 of fp8, for each half of the unit
//
// Byte planes: the values of 16-bit elements are stored as all low bytes, then all high bytes, so that one permutation of
// bytes expands either. A plane holds n chunks: in chunk `unit`, word j: the first four values of group j; in chunks 4 and
// 5 the others, n - 4 bytes a group. No value crosses a word.
//
// The word of a unit gives the positions: bit 4 i + j is set where group j drops input i. Shifted by j and masked, each
// half byte of the word is 0 or 1, and one multiplication turns them into the index of each input's value.
//
// A dense weight has its values in the order of the registers of A: two chunks a step, of fp8, which is widened, one.
#pragma once

#include "layout.h"

namespace twofour {

struct GroupPlace {
  int row, input;  // of the block's tile, of the unit
};

TWOFOUR_HD constexpr GroupPlace group_place(int type, int lane, int j) {
  const int t = lane % 4;
  return {lane / 4 + 8 * (j & 1), type == TWOFOUR_INT8 ? 16 * t + 8 * (j / 2) : 32 * (j / 2) + 8 * t};
}

// The byte, among a lane's value chunks, of byte `plane` of input `index` of group j of a unit of a dense weight.
TWOFOUR_HD constexpr int dense_byte(int type, int unit, int j, int index, int plane) {
  const int high = j & 1, step = 2 * unit + j / 2;
  if (type == TWOFOUR_INT8) return kChunkBytes * step + 4 * (high + 2 * (index / 4)) + index % 4;
  if (type == TWOFOUR_FP8) return kChunkBytes * step + 4 * (2 * high + index / 4) + index % 4;
  return kChunkBytes * (2 * step + index / 4) + 4 * (high + 2 * (index / 2 % 2)) + 2 * (index % 2) + plane;
}

// The same of value `index` (0 to n - 1) of a form.
TWOFOUR_HD constexpr int value_byte(Form form, int unit, int j, int index, int plane) {
  const int keep = form.keep;
  if (keep == kKeepAll) return dense_byte(form.type, unit, j, index, plane);
  const int rest = (keep - 4) * (4 * unit + j) + index - 4;
  return kChunkBytes * keep * plane + (index < 4 ? kChunkBytes * unit + 4 * j + index : 4 * kChunkBytes + rest);
}

// The inputs of a group that it keeps: its nonzeros, and the lowest others until there are `keep`.
TWOFOUR_HD constexpr unsigned kept_inputs(unsigned nonzeros, int keep) {
  int count = 0;
  for (int i = 0; i < 8; ++i) count += static_cast<int>((nonzeros >> i) & 1u);
  for (int i = 0; i < 8 && count < keep; ++i) {
    if ((nonzeros >> i) & 1u) continue;
    nonzeros |= 1u << i;
    ++count;
  }
  return nonzeros;
}

TWOFOUR_HD void pack_word_of8(Form form, const Extent& e, const void* weight, uint8_t* packed, int64_t index) {
  const Word w = word_at(index, e.k);
  uint8_t* block = packed + (w.tile * input_blocks(e.k) + w.block) * block_bytes(form);
  uint32_t dropped = 0;
  for (int j = 0; j < 4; ++j) {
    const GroupPlace at = group_place(form.type, w.lane, j);
    const int64_t row = w.tile * kTileRows + at.row, column = w.block * kBlockInputs + w.unit * kUnitInputs + at.input;
    unsigned bits[8] = {}, nonzeros = 0;
    for (int i = 0; i < 8; ++i) {
      if (row < e.n && column + i < e.k) bits[i] = load_element(form.type, weight, row * e.pitch + column + i);
      if (is_zero(form.type, bits[i])) bits[i] = 0;  // -0.0 too
      else nonzeros |= 1u << i;
    }
    const unsigned kept = kept_inputs(nonzeros, form.keep);
    for (int i = 0, value = 0; i < 8; ++i) {
      if (!((kept >> i) & 1u)) {
        dropped |= 1u << (4 * i + j);
        continue;
      }
      for (int plane = 0; plane < element_bytes(form.type); ++plane)
        block[value_offset(w.lane, value_byte(form, w.unit, j, value, plane))] =
            static_cast<uint8_t>(bits[i] >> (8 * plane) & 0xFFu);
      ++value;
    }
  }
  if (form.keep != kKeepAll) *reinterpret_cast<uint32_t*>(block + positions_offset(form, w.lane, w.unit)) = dropped;
}

TWOFOUR_HD void unpack_word_of8(Form form, const Extent& e, const uint8_t* packed, void* weight, int64_t index) {
  const Word w = word_at(index, e.k);
  const uint8_t* block = packed + (w.tile * input_blocks(e.k) + w.block) * block_bytes(form);
  uint32_t dropped = 0;
  if (form.keep != kKeepAll) dropped = *reinterpret_cast<const uint32_t*>(block + positions_offset(form, w.lane, w.unit));
  const int size = element_bytes(form.type);
  for (int j = 0; j < 4; ++j) {
    const GroupPlace at = group_place(form.type, w.lane, j);
    const int64_t row = w.tile * kTileRows + at.row, column = w.block * kBlockInputs + w.unit * kUnitInputs + at.input;
    for (int i = 0, value = 0; i < 8; ++i) {
      const bool kept = ((dropped >> (4 * i + j)) & 1u) == 0;
      if (row < e.n && column + i < e.k) {
        uint8_t* target = static_cast<uint8_t*>(weight) + (row * e.pitch + column + i) * size;
        for (int b = 0; b < size; ++b)
          target[b] = kept ? block[value_offset(w.lane, value_byte(form, w.unit, j, value, b))] : uint8_t{0};
      }
      value += kept ? 1 : 0;
    }
  }
}

TWOFOUR_HD void pack_word(Form form, const Extent& e, const void* weight, uint8_t* packed, int64_t index) {
  if (form.keep == kKeep2of4) pack_word_2of4(form.type, e, weight, packed, index);
  else pack_word_of8(form, e, weight, packed, index);
}
TWOFOUR_HD void unpack_word(Form form, const Extent& e, const uint8_t* packed, void* weight, int64_t index) {
  if (form.keep == kKeep2of4) unpack_word_2of4(form.type, e, packed, weight, index);
  else unpack_word_of8(form, e, packed, weight, index);
}

}  // namespace twofour
