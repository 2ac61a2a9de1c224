// How a packed weight lies in memory: tiles of 32 rows, one after the other; in a tile, blocks of 32 inputs; in a block,
// two halves of 16 rows. A kernel reads a tile from front to back, and one vector register takes 16 rows, so that no sum
// crosses lanes. A half is
//
//   int8        8 units of 64 bytes: unit u holds inputs 4u to 4u + 3 of row 0, of row 1, ...        512 bytes
//   int8 2:4    the same units with the zeros left out: 8 x 32 values, then 8 masks of 64 bits       320 bytes
//   bf16        16 units of 64 bytes: unit u holds inputs 2u and 2u + 1 of row 0, of row 1, ...     1024 bytes
//   bf16 2:4    units of 4 inputs x 8 rows with the zeros left out: 16 x 16 values, then 16 masks    576 bytes
//               of 32 bits; unit 2u + h holds inputs 4u to 4u + 3 of rows 8h to 8h + 7
//   n:8         the units of 2:4 with n of 8 inputs' values: 64 n values, then the masks         64 n + 64 bytes of int8
//
// Bit i of a mask says that element i of its unit is the next value. A group of 4 inputs has two bits set, so that the
// size of a 2:4 unit is fixed; of n:8 it is that of an octet: the units of 8 inputs x 16 rows, 16 n values and 16 bytes
// of masks, within which a unit's values begin after as many as the masks before it have bits set. Rows and inputs beyond the weight's are zeros. After the tiles, int8 forms hold 128 times each row's
// sum as int32, because the kernels multiply x + 128, which is unsigned, and take the difference off; then 64 bytes, the
// first of them 1 where a weight is -128, which AVX2's instructions cannot take.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "twofour_cpu.h"

namespace twofour_cpu {

constexpr int kTileRows = 32;
constexpr int kHalfRows = 16;
constexpr int kBlockInputs = 32;
constexpr int kInt8Offset = 128;

constexpr int kHalfElements = kHalfRows * kBlockInputs;
constexpr int kOctetMaskBytes = kHalfRows * 8 / 8;

constexpr bool is_int8(int form) { return form < TWOFOUR_CPU_BF16; }
constexpr bool is_dense(int form) { return form == TWOFOUR_CPU_INT8 || form == TWOFOUR_CPU_BF16; }
constexpr bool is_2of4(int form) { return form == TWOFOUR_CPU_INT8_2OF4 || form == TWOFOUR_CPU_BF16_2OF4; }
constexpr int element_bytes(int form) { return is_int8(form) ? 1 : 2; }
constexpr int kept_of_8(int form) {
  return is_dense(form) ? 8 : is_2of4(form) ? 4 : form - (is_int8(form) ? TWOFOUR_CPU_INT8_4OF8 : TWOFOUR_CPU_BF16_4OF8) + 4;
}
constexpr int group_inputs(int form) { return is_dense(form) ? 1 : is_2of4(form) ? 4 : 8; }
constexpr int kept_of_group(int form) { return group_inputs(form) * kept_of_8(form) / 8; }
constexpr int masks_at(int form) { return kHalfElements / 8 * kept_of_8(form) * element_bytes(form); }  // in a half
constexpr int half_bytes(int form) { return masks_at(form) + (is_dense(form) ? 0 : kHalfElements / 8); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t tiles_of(int64_t rows) { return ceil_div(rows, kTileRows); }
constexpr int64_t blocks_of(int64_t inputs) { return ceil_div(inputs, kBlockInputs); }
constexpr int64_t tile_bytes(int form, int64_t inputs) { return blocks_of(inputs) * 2 * half_bytes(form); }
constexpr int64_t offsets_at(int form, int64_t rows, int64_t inputs) { return tiles_of(rows) * tile_bytes(form, inputs); }
constexpr int64_t lowest_at(int form, int64_t rows, int64_t inputs) {
  return offsets_at(form, rows, inputs) + tiles_of(rows) * kTileRows * static_cast<int64_t>(sizeof(int32_t));
}
constexpr int64_t packed_bytes(int form, int64_t rows, int64_t inputs) {
  return is_int8(form) ? lowest_at(form, rows, inputs) + 64 : offsets_at(form, rows, inputs);
}

void pack(int form, int64_t rows, int64_t inputs, const void* values, const uint8_t* positions, uint8_t* packed);
void unpack(int form, int64_t rows, int64_t inputs, const uint8_t* packed, void* weight);

}  // namespace twofour_cpu
