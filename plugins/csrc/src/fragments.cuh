// Multiplies a packed block of weights in a warp and stores the sums: shared by the staged and the streamed kernel.
//
// Both sources are compiled twice: by nvcc over ptx.cuh, and by the host compiler over simt.h, where the same code runs
// thread by thread on a CPU. Both define namespace gpu.
#pragma once

#include "layout.h"
#include "skinny_problem.h"

namespace twofour {

// The token (0..7) whose row of x a lane loads from.
template <int kType>
TWOFOUR_DEVICE int token_of_lane(int lane) {
  return kType == TWOFOUR_FP8 ? lane / 4 : lane % 8;
}

template <int kType>
TWOFOUR_DEVICE gpu::Fragment load_a(const uint8_t* tile, int unit, int step, int lane) {
  if constexpr (kType != TWOFOUR_FP8) {
    const int chunk = kType == TWOFOUR_INT8 ? unit : 2 * unit + step;
    return gpu::load_16(tile + (chunk * kLanes + lane) * kChunkBytes);
  } else {
    const gpu::Pair packed = gpu::load_8(tile + (unit * kLanes + lane) * kChunkBytes + 8 * step);
    return {{gpu::widen_fp8(packed.r[0]), gpu::widen_fp8(packed.r[0] >> 16), gpu::widen_fp8(packed.r[1]),
             gpu::widen_fp8(packed.r[1] >> 16)}};
  }
}

// x_row: where the 256 inputs of this block begin for the lane's token.
template <int kType>
TWOFOUR_DEVICE gpu::Fragment load_b(const uint8_t* x_row, int unit, int step, int lane) {
  if constexpr (kType != TWOFOUR_FP8) {
    const int column = (kType == TWOFOUR_INT8 ? unit : 2 * unit + step) * 64;  // bytes
    return gpu::load_matrices(x_row + column + lane / 8 * kChunkBytes);
  } else {
    const int t = lane % 4;
    const gpu::Fragment groups = gpu::load_16(x_row + unit * 64 + 32 * (t / 2) + 16 * step);
    gpu::Fragment b;
    TWOFOUR_UNROLL
    for (int i = 0; i < 4; ++i) b.r[i] = gpu::widen_fp8(groups.r[i] >> (16 * (t % 2)));
    return b;
  }
}

// mma.sp instructions in a block of 256 inputs, for each tile of 8 tokens.
template <int kType>
constexpr int kSteps = kUnits * (kType == TWOFOUR_INT8 ? 1 : 2);
template <int kType>
TWOFOUR_HD constexpr int unit_of(int i) {
  return kType == TWOFOUR_INT8 ? i : i / 2;
}
template <int kType>
TWOFOUR_HD constexpr int step_of(int i) {
  return kType == TWOFOUR_INT8 ? 0 : i % 2;
}

// sums[r][n] += packed block r of `blocks` times the 8 tokens at x_rows[n]. A block beyond the weight's last row may hold
// any values: its sums are discarded.
template <int kType, int kTiles, int kTokenTiles, class Accumulator>
TWOFOUR_DEVICE void multiply_blocks(const uint8_t* blocks, const uint8_t* const (&x_rows)[kTokenTiles], int lane,
                                    Accumulator (&sums)[kTiles][kTokenTiles][4]) {
  gpu::Fragment metadata[kTiles];
  TWOFOUR_UNROLL
  for (int r = 0; r < kTiles; ++r)
    metadata[r] = gpu::load_16(blocks + r * block_bytes(kType) + meta_offset(kType, lane, 0));
  TWOFOUR_UNROLL
  for (int i = 0; i < kSteps<kType>; ++i) {
    const int unit = unit_of<kType>(i), step = step_of<kType>(i);
    gpu::Fragment b[kTokenTiles];
    TWOFOUR_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) b[n] = load_b<kType>(x_rows[n], unit, step, lane);
    TWOFOUR_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      const gpu::Fragment a = load_a<kType>(blocks + r * block_bytes(kType), unit, step, lane);
      TWOFOUR_UNROLL
      for (int n = 0; n < kTokenTiles; ++n) gpu::mma_sp<kType>(sums[r][n], a, b[n], metadata[r].r[unit], step);
    }
  }
}

// The same for one block, with all of x in registers.
template <int kType, int kTokenTiles, class Accumulator>
TWOFOUR_DEVICE void multiply_block(const uint8_t* block, const gpu::Fragment (&x)[kSteps<kType>][kTokenTiles], int lane,
                                   Accumulator (&sums)[kTokenTiles][4]) {
  const gpu::Fragment metadata = gpu::load_16(block + meta_offset(kType, lane, 0));
  TWOFOUR_UNROLL
  for (int i = 0; i < kSteps<kType>; ++i) {
    const gpu::Fragment a = load_a<kType>(block, unit_of<kType>(i), step_of<kType>(i), lane);
    TWOFOUR_UNROLL
    for (int n = 0; n < kTokenTiles; ++n)
      gpu::mma_sp<kType>(sums[n], a, x[i][n], metadata.r[unit_of<kType>(i)], step_of<kType>(i));
  }
}

// Which element of a 16 x 8 tile accumulator c (0..3) of a lane is.
TWOFOUR_HD constexpr int row_of_sum(int lane, int c) { return lane / 4 + 8 * (c / 2); }
TWOFOUR_HD constexpr int token_of_sum(int lane, int c) { return 2 * (lane % 4) + c % 2; }

// y[token, feature] = scale * sum + bias, where both indices are in range.
template <class Accumulator>
TWOFOUR_DEVICE void store_output(const SkinnyProblem& p, int64_t feature, int token, Accumulator sum) {
  if (feature >= p.out_features || token >= p.tokens) return;
  const float scale = p.channel_scales != nullptr ? p.channel_scales[feature] : p.scale;
  float value = gpu::multiply(static_cast<float>(sum), scale);
  if (p.bias != nullptr) value = gpu::add(value, gpu::load_float(p.out_type, p.bias, feature));
  gpu::store_float(p.out_type, p.y, token * p.y_pitch + feature, value);
}

}  // namespace twofour
