// The packed forms of a weight that the skinny kernel reads, as index maps that host and device code share: here what
// they have in common, and the form of 2:4; layout_of8.h has that of 4:8, 5:8 and 6:8.
//
// The unit is a *block*, 16 output features x 256 inputs, stored contiguously; blocks of one 16-row tile follow
// each other along K, tiles along N. A block holds chunks of 16 bytes for each of the 32 lanes, chunk-major, so that
// a warp reads 512 contiguous bytes at a time: first the values, in the order the lane feeds them to mma, last one chunk
// with four 32-bit words that give their positions. Bytes against dense: 0.5625 at 16 bits, 0.625 at 8 bits.
//
// In a 2:4 weight those words are the metadata of mma.sp. The 256 inputs are four *units* of 64 inputs = 16 groups of 4. A unit is
//   fp16, bf16:  two mma.sp.m16n8k32 (steps), two chunks, one metadata word (selector 0 and 1)
//   fp8:         the same two m16n8k32 on values widened to fp16 in registers, one chunk: only sm_89 and sm_120 have
//                an fp8 mma.sp, elsewhere ptxas emulates it with these very conversions and a shuffle of the metadata
//   int8:        one mma.sp.m16n8k64, one chunk, one metadata word
//
// Fragments are those of the PTX ISA, "Matrix fragments for sparse mma.m16n8k32 / m16n8k64": with g = lane / 4 and
// t = lane % 4, register j of A holds row g + 8 (j & 1). In m16n8k32 its two values come from group t + 4 (j >> 1); in
// m16n8k64 its four values from groups 2t and 2t + 1, plus 8 where j >= 2. Metadata, 4 bits a group, ascending:
//   m16n8k32: lanes with t / 2 == selector; groups 4 (t & 1) to +3 of row g in the low half, of row g + 8 in the high
//   m16n8k64: all lanes; groups 8 (t / 2) to +7 of row g + 8 (t & 1)
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "twofour.h"

#if defined(__CUDACC__)
#define TWOFOUR_HD __host__ __device__ __forceinline__
#else
#define TWOFOUR_HD inline
#endif

namespace twofour {

constexpr int kLayoutVersion = 1;
constexpr int kTileRows = 16;      // output features of a block
constexpr int kBlockInputs = 256;  // inputs of a block
constexpr int kUnitInputs = 64;
constexpr int kUnits = kBlockInputs / kUnitInputs;
constexpr int kLanes = 32;
constexpr int kChunkBytes = 16;

// What a packed weight holds: elements of `type`, of each group the `keep` that its pattern allows (2 of 4; 4, 5, 6 of 8;
// all 8 of a dense weight).
struct Form {
  int type, keep;
};
constexpr int kKeep2of4 = 2, kKeepAll = 8;
constexpr int kPatterns[] = {kKeep2of4, 4, 5, 6};
TWOFOUR_HD constexpr int group_inputs(int keep) { return keep == kKeep2of4 ? 4 : 8; }

// 0: not a kernel that reads a packed form.
TWOFOUR_HD constexpr int keep_of(int kernel) {
  return kernel == TWOFOUR_SKINNY ? kKeep2of4
         : kernel == TWOFOUR_SKINNY_4OF8 ? 4
         : kernel == TWOFOUR_SKINNY_5OF8 ? 5
         : kernel == TWOFOUR_SKINNY_6OF8 ? 6
                                         : 0;
}
TWOFOUR_HD constexpr Form form_of(const twofour_gemm& g) { return {g.type, keep_of(g.kernel)}; }
inline bool is_skinny(const twofour_gemm& g) { return keep_of(g.kernel) != 0; }

TWOFOUR_HD constexpr int element_bytes(int type) { return type == TWOFOUR_FP16 || type == TWOFOUR_BF16 ? 2 : 1; }
TWOFOUR_HD constexpr int value_chunks(Form form) {
  return (form.keep == kKeep2of4 ? 4 : form.keep) * element_bytes(form.type);
}
TWOFOUR_HD constexpr int chunks(Form form) { return value_chunks(form) + (form.keep == kKeepAll ? 0 : 1); }
TWOFOUR_HD constexpr int block_bytes(Form form) { return chunks(form) * kLanes * kChunkBytes; }

TWOFOUR_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TWOFOUR_HD constexpr int64_t row_tiles(int64_t out_features) { return ceil_div(out_features, kTileRows); }
TWOFOUR_HD constexpr int64_t input_blocks(int64_t in_features) { return ceil_div(in_features, kBlockInputs); }
TWOFOUR_HD constexpr size_t packed_bytes(Form form, int64_t out_features, int64_t in_features) {
  return static_cast<size_t>(row_tiles(out_features) * input_blocks(in_features)) * static_cast<size_t>(block_bytes(form));
}

// Elements from row to row of x and y. One row has none after it: its slice is dense.
TWOFOUR_HD int64_t x_pitch(const twofour_gemm& g) { return g.x_pitch == 0 || g.tokens == 1 ? g.in_features : g.x_pitch; }
TWOFOUR_HD int64_t y_pitch(const twofour_gemm& g) { return g.y_pitch == 0 || g.tokens == 1 ? g.out_features : g.y_pitch; }

// Which group of a unit (0..15) the hardware's group h (0..7) of step s is, for the m16n8k32 types. For fp8 the order
// lets a lane pair fetch its activations with 16-byte loads: B register i of lane t holds half (t & 1) of the hardware
// group 2 i + t / 2, and these land on 16 contiguous bytes of x.
TWOFOUR_HD constexpr int unit_group(int type, int step, int h) {
  return type == TWOFOUR_FP8 ? 8 * (h & 1) + 4 * step + (h >> 1) : 8 * step + h;
}

// The group whose 4 bits are number i (0..7, from the low end) of a lane's metadata word, and the place of its values:
// the lane that holds them, and the byte of that lane's value chunks.
struct Place {
  int row, group, lane, byte;
};

TWOFOUR_HD constexpr Place place(int type, int unit, int meta_lane, int i) {
  const int g = meta_lane / 4, t = meta_lane % 4;
  if (type == TWOFOUR_INT8) {
    const int high = t % 2, half = t / 2, j = high + 2 * half;
    return {g + 8 * high, 8 * half + i, 4 * g + i / 2, kChunkBytes * unit + 4 * j + 2 * (i % 2)};
  }
  const int step = t / 2, high = i / 4, half = t % 2, j = high + 2 * half;
  const int bytes = 2 * element_bytes(type);  // of a group's two values
  return {g + 8 * high, unit_group(type, step, 4 * half + i % 4), 4 * g + i % 4, (2 * unit + step) * 4 * bytes + bytes * j};
}

// Offset in a block of byte `byte` of a lane's value chunks, and of its word of positions of a unit.
TWOFOUR_HD constexpr int value_offset(int lane, int byte) {
  return (byte / kChunkBytes) * kLanes * kChunkBytes + lane * kChunkBytes + byte % kChunkBytes;
}
TWOFOUR_HD constexpr int positions_offset(Form form, int lane, int unit) {
  return value_chunks(form) * kLanes * kChunkBytes + lane * kChunkBytes + 4 * unit;
}

// The two kept positions of a group, ascending, as the 4 bits of metadata: i0 | i1 << 2. A group with fewer than two
// nonzeros is filled up with the lowest free positions, whose values are zero.
TWOFOUR_HD constexpr unsigned kept_positions(unsigned nonzero_mask) {
  unsigned first = 4, second = 4, mask = nonzero_mask;
  for (unsigned need = 0; need < 4; ++need) {  // add free positions until two are kept
    unsigned count = 0;
    for (unsigned i = 0; i < 4; ++i) count += (mask >> i) & 1u;
    if (count >= 2) break;
    if (!((mask >> need) & 1u)) mask |= 1u << need;
  }
  for (unsigned i = 0; i < 4; ++i) {
    if (!((mask >> i) & 1u)) continue;
    if (first == 4) first = i;
    else if (second == 4) second = i;
  }
  return first | second << 2;
}

// Whether an element is a zero of either sign. int8 has one zero; 0x80 is -128 there and -0.0 in fp8.
TWOFOUR_HD constexpr bool is_zero(int type, unsigned bits) {
  return type == TWOFOUR_INT8 ? bits == 0 : type == TWOFOUR_FP8 ? (bits & 0x7Fu) == 0 : (bits & 0x7FFFu) == 0;
}

TWOFOUR_HD unsigned load_element(int type, const void* w, int64_t index) {
  return element_bytes(type) == 2 ? static_cast<const uint16_t*>(w)[index] : static_cast<const uint8_t*>(w)[index];
}

// A row-major weight [n, k] in memory, with `pitch` elements from row to row.
struct Extent {
  int64_t n, k, pitch;
};

// One word of positions and the values of its groups: all the work of packing is a loop over `packed_words` of these.
// The packed form has zeros where it reaches beyond the weight.
struct Word {
  int64_t tile, block;
  int unit, lane;
};
TWOFOUR_HD constexpr int64_t packed_words(const Extent& e) {
  return row_tiles(e.n) * input_blocks(e.k) * kUnits * kLanes;
}
TWOFOUR_HD constexpr Word word_at(int64_t index, int64_t k) {
  const int64_t block = index / (kUnits * kLanes);
  return {block / input_blocks(k), block % input_blocks(k), static_cast<int>(index / kLanes % kUnits),
          static_cast<int>(index % kLanes)};
}

TWOFOUR_HD void pack_word_2of4(int type, const Extent& e, const void* weight, uint8_t* packed, int64_t index) {
  const Word w = word_at(index, e.k);
  uint8_t* block = packed + (w.tile * input_blocks(e.k) + w.block) * block_bytes({type, kKeep2of4});
  uint32_t metadata = 0;
  for (int i = 0; i < 8; ++i) {
    const Place at = place(type, w.unit, w.lane, i);
    const int64_t row = w.tile * kTileRows + at.row, column = w.block * kBlockInputs + w.unit * kUnitInputs + 4 * at.group;
    unsigned bits[4] = {0, 0, 0, 0}, mask = 0;
    for (int j = 0; j < 4; ++j) {
      if (row < e.n && column + j < e.k) bits[j] = load_element(type, weight, row * e.pitch + column + j);
      if (is_zero(type, bits[j])) bits[j] = 0;  // -0.0 too
      else mask |= 1u << j;
    }
    const unsigned code = kept_positions(mask);
    metadata |= code << (4 * i);
    uint8_t* values = block + value_offset(at.lane, at.byte);
    for (int j = 0; j < 2; ++j) {
      const unsigned value = bits[(code >> (2 * j)) & 3u];
      values[j * element_bytes(type)] = static_cast<uint8_t>(value & 0xFFu);
      if (element_bytes(type) == 2) values[2 * j + 1] = static_cast<uint8_t>(value >> 8);
    }
  }
  *reinterpret_cast<uint32_t*>(block + positions_offset({type, kKeep2of4}, w.lane, w.unit)) = metadata;
}

TWOFOUR_HD void unpack_word_2of4(int type, const Extent& e, const uint8_t* packed, void* weight, int64_t index) {
  const Word w = word_at(index, e.k);
  const uint8_t* block = packed + (w.tile * input_blocks(e.k) + w.block) * block_bytes({type, kKeep2of4});
  const uint32_t metadata = *reinterpret_cast<const uint32_t*>(block + positions_offset({type, kKeep2of4}, w.lane, w.unit));
  const int size = element_bytes(type);
  for (int i = 0; i < 8; ++i) {
    const Place at = place(type, w.unit, w.lane, i);
    const int64_t row = w.tile * kTileRows + at.row, column = w.block * kBlockInputs + w.unit * kUnitInputs + 4 * at.group;
    const uint8_t* values = block + value_offset(at.lane, at.byte);
    const int first = static_cast<int>(metadata >> (4 * i) & 3u), second = static_cast<int>(metadata >> (4 * i + 2) & 3u);
    for (int j = 0; j < 4; ++j) {
      if (row >= e.n || column + j >= e.k) continue;
      uint8_t* target = static_cast<uint8_t*>(weight) + (row * e.pitch + column + j) * size;
      for (int b = 0; b < size; ++b) target[b] = j == first ? values[b] : j == second ? values[size + b] : uint8_t{0};
    }
  }
}

// Whether group `group` of 4 or 8 inputs, counted along the rows, holds more than `keep` nonzeros.
TWOFOUR_HD bool violates(Form form, const Extent& e, const void* weight, int64_t group) {
  const int inputs = group_inputs(form.keep);
  const int64_t groups = e.k / inputs, first = group / groups * e.pitch + group % groups * inputs;
  int nonzeros = 0;
  for (int i = 0; i < inputs; ++i) nonzeros += is_zero(form.type, load_element(form.type, weight, first + i)) ? 0 : 1;
  return nonzeros > form.keep;
}

}  // namespace twofour
