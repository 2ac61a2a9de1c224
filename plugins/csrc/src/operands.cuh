// The operands of one step of the skinny kernels, as a lane holds them: weights from their packed form, and x.
#pragma once

#include "layout_of8.h"

namespace twofour {

// The token (0..7) whose row of x a lane loads from.
template <int kType, int kKeep>
TWOFOUR_DEVICE int token_of_lane(int lane) {
  return kType == TWOFOUR_FP8 || kKeep != kKeep2of4 ? lane / 4 : lane % 8;
}

// Bytes after the inputs of a token in shared memory, so that the rows of one load hit different banks: the 8 of ldmatrix,
// 16 bytes each, or those of loads of 16 or (fp8) 8 bytes a lane, 4 lanes a row.
template <int kType, int kKeep>
constexpr int kRowPadding = kKeep == kKeep2of4 ? kChunkBytes : kType == TWOFOUR_FP8 ? 32 : 64;

// What one step multiplies: 16 rows of weights as mma takes them, and the metadata of mma.sp or a second dense mma.
template <int kKeep>
struct Operand {
  gpu::Fragment a[kKeep == kKeep2of4 ? 1 : 2];
  uint32_t metadata;
};

// Four e4m3 as fp16, for two registers.
TWOFOUR_DEVICE gpu::Pair widen_four(uint32_t v) { return {{gpu::widen_fp8(v), gpu::widen_fp8(v >> 16)}}; }

template <int kType>
TWOFOUR_DEVICE Operand<kKeep2of4> load_2of4(const uint8_t* block, uint32_t metadata, int unit, int step, int lane) {
  if constexpr (kType != TWOFOUR_FP8) {
    const int chunk = kType == TWOFOUR_INT8 ? unit : 2 * unit + step;
    return {{gpu::load_16(block + (chunk * kLanes + lane) * kChunkBytes)}, metadata};
  } else {
    const gpu::Pair packed = gpu::load_8(block + (unit * kLanes + lane) * kChunkBytes + 8 * step);
    const gpu::Pair low = widen_four(packed.r[0]), high = widen_four(packed.r[1]);
    return {{{{low.r[0], low.r[1], high.r[0], high.r[1]}}}, metadata};
  }
}

// Byte i of the result: the index, among the values of group j, of the value of input i, or 7 where the group drops it.
// Each half byte of a product counts the inputs dropped before input i.
TWOFOUR_DEVICE uint32_t value_indices(uint32_t positions, int j) {
  const uint32_t dropped = (positions >> j) & 0x11111111u;
  return (0x76543210u - dropped * 0x11111110u) | dropped * 7u;
}

// The values of group j beyond the fourth, with 0 in the last byte.
template <int kKeep>
TWOFOUR_DEVICE uint32_t rest_of_group(const gpu::Fragment& rest, int unit, int j) {
  if constexpr (kKeep == 4) return 0;
  else if constexpr (kKeep == 5) return j == 0 ? rest.r[unit] & 0xFFu : rest.r[unit] >> (8 * j);
  else return j % 2 == 0 ? rest.r[2 * (unit % 2) + j / 2] & 0xFFFFu : rest.r[2 * (unit % 2) + j / 2] >> 16;
}

// One byte plane of the 8 inputs of group j of a unit, from chunks in shared memory.
template <int kKeep>
TWOFOUR_DEVICE gpu::Pair expand_group(const uint8_t* plane, uint32_t indices, int unit, int j, int lane) {
  const auto chunk = [&](int c) { return gpu::load_16(plane + (c * kLanes + lane) * kChunkBytes); };
  const uint32_t first = chunk(unit).r[j];
  gpu::Fragment others{};
  if constexpr (kKeep > 4) others = chunk(4 + (kKeep == 6 ? unit / 2 : 0));
  const uint32_t rest = rest_of_group<kKeep>(others, unit, j);
  return {{gpu::permute_bytes(first, rest, indices), gpu::permute_bytes(first, rest, indices >> 16)}};
}

// The 8 inputs of group j of a unit in 16 bits, two a register.
template <int kType, int kKeep>
TWOFOUR_DEVICE gpu::Fragment expand_group_16(const uint8_t* block, uint32_t positions, int unit, int j, int lane) {
  const uint32_t indices = value_indices(positions, j);
  const gpu::Pair low = expand_group<kKeep>(block, indices, unit, j, lane);
  if constexpr (kType == TWOFOUR_FP8) {
    const gpu::Pair first = widen_four(low.r[0]), second = widen_four(low.r[1]);
    return {{first.r[0], first.r[1], second.r[0], second.r[1]}};
  } else {
    const gpu::Pair high = expand_group<kKeep>(block + kKeep * kLanes * kChunkBytes, indices, unit, j, lane);
    gpu::Fragment out;
    TWOFOUR_UNROLL
    for (int i = 0; i < 2; ++i) {
      out.r[2 * i] = gpu::permute_bytes(low.r[i], high.r[i], 0x5140u);
      out.r[2 * i + 1] = gpu::permute_bytes(low.r[i], high.r[i], 0x7362u);
    }
    return out;
  }
}

template <int kType, int kKeep>
TWOFOUR_DEVICE Operand<kKeep> load_of8(const uint8_t* block, uint32_t positions, int unit, int step, int lane) {
  Operand<kKeep> out{};
  TWOFOUR_UNROLL
  for (int half = 0; half < 2; ++half) {  // rows g, rows g + 8
    if constexpr (kType == TWOFOUR_INT8) {
      TWOFOUR_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * i + half;
        const gpu::Pair group = expand_group<kKeep>(block, value_indices(positions, j), unit, j, lane);
        out.a[i].r[half] = group.r[0], out.a[i].r[half + 2] = group.r[1];
      }
    } else {
      const gpu::Fragment group = expand_group_16<kType, kKeep>(block, positions, unit, 2 * step + half, lane);
      TWOFOUR_UNROLL
      for (int i = 0; i < 2; ++i) out.a[i].r[half] = group.r[2 * i], out.a[i].r[half + 2] = group.r[2 * i + 1];
    }
  }
  return out;
}

template <int kType>
TWOFOUR_DEVICE Operand<kKeepAll> load_dense(const uint8_t* block, int unit, int step, int lane) {
  const auto chunk = [&](int c) { return gpu::load_16(block + (c * kLanes + lane) * kChunkBytes); };
  if constexpr (kType == TWOFOUR_INT8) {
    return {{chunk(2 * unit), chunk(2 * unit + 1)}, 0};
  } else if constexpr (kType != TWOFOUR_FP8) {
    return {{chunk(4 * unit + 2 * step), chunk(4 * unit + 2 * step + 1)}, 0};
  } else {
    const gpu::Fragment packed = chunk(2 * unit + step);
    Operand<kKeepAll> out{};
    TWOFOUR_UNROLL
    for (int half = 0; half < 2; ++half) {  // rows g, rows g + 8
      TWOFOUR_UNROLL
      for (int i = 0; i < 2; ++i) {
        const gpu::Pair four = widen_four(packed.r[2 * half + i]);
        out.a[i].r[half] = four.r[0], out.a[i].r[half + 2] = four.r[1];
      }
    }
    return out;
  }
}

// Of one block, the positions of all units.
template <int kType, int kKeep>
TWOFOUR_DEVICE gpu::Fragment load_positions(const uint8_t* block, int lane) {
  if constexpr (kKeep == kKeepAll) return {};
  else return gpu::load_16(block + positions_offset(Form{kType, kKeep}, lane, 0));
}

template <int kType, int kKeep>
TWOFOUR_DEVICE Operand<kKeep> load_a(const uint8_t* block, const gpu::Fragment& positions, int unit, int step, int lane) {
  if constexpr (kKeep == kKeep2of4) return load_2of4<kType>(block, positions.r[unit], unit, step, lane);
  else if constexpr (kKeep == kKeepAll) return load_dense<kType>(block, unit, step, lane);
  else return load_of8<kType, kKeep>(block, positions.r[unit], unit, step, lane);
}

// x_row: where the 256 inputs of this block begin for the lane's token.
template <int kType, int kKeep>
TWOFOUR_DEVICE gpu::Fragment load_b(const uint8_t* x_row, int unit, int step, int lane) {
  const int t = lane % 4;
  const int column = (kType == TWOFOUR_INT8 ? unit : 2 * unit + step) * 64;  // bytes
  if constexpr (kKeep != kKeep2of4 && kType == TWOFOUR_FP8) {
    const gpu::Pair group = gpu::load_8(x_row + unit * 64 + 32 * step + 8 * t);
    const gpu::Pair low = widen_four(group.r[0]), high = widen_four(group.r[1]);
    return {{low.r[0], low.r[1], high.r[0], high.r[1]}};
  } else if constexpr (kKeep != kKeep2of4) {
    return gpu::load_16(x_row + column + 16 * t);
  } else if constexpr (kType != TWOFOUR_FP8) {
    return gpu::load_matrices(x_row + column + lane / 8 * kChunkBytes);
  } else {
    const gpu::Fragment groups = gpu::load_16(x_row + unit * 64 + 32 * (t / 2) + 16 * step);
    gpu::Fragment b;
    TWOFOUR_UNROLL
    for (int i = 0; i < 4; ++i) b.r[i] = gpu::widen_fp8(groups.r[i] >> (16 * (t % 2)));
    return b;
  }
}

template <int kType, int kKeep, class Accumulator>
TWOFOUR_DEVICE void multiply_step(Accumulator (&sums)[4], const Operand<kKeep>& w, const gpu::Fragment& b, int step) {
  if constexpr (kKeep == kKeep2of4) {
    gpu::mma_sp<kType>(sums, w.a[0], b, w.metadata, step);
  } else {
    gpu::mma<kType>(sums, w.a[0], {{b.r[0], b.r[1]}});
    gpu::mma<kType>(sums, w.a[1], {{b.r[2], b.r[3]}});
  }
}

}  // namespace twofour
