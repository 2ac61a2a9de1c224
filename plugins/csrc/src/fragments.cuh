// Multiplies a packed block of weights in a warp and stores the sums: shared by the staged and the streamed kernel.
//
// Both sources are compiled twice: by nvcc over ptx.cuh, and by the host compiler over simt.h, where the same code runs
// thread by thread on a CPU. Both define namespace gpu.
#pragma once

#include "operands.cuh"
#include "skinny_problem.h"

namespace twofour {

// Steps in a block of 256 inputs: each multiplies by one mma.sp, or by two dense mma, for each tile of 8 tokens.
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
template <int kType, int kKeep, int kTiles, int kTokenTiles, class Accumulator>
TWOFOUR_DEVICE void multiply_blocks(const uint8_t* blocks, const uint8_t* const (&x_rows)[kTokenTiles], int lane,
                                    Accumulator (&sums)[kTiles][kTokenTiles][4]) {
  constexpr Form kForm{kType, kKeep};
  gpu::Fragment positions[kTiles];
  TWOFOUR_UNROLL
  for (int r = 0; r < kTiles; ++r)
    positions[r] = gpu::load_16(blocks + r * block_bytes(kForm) + positions_offset(kForm, lane, 0));
  TWOFOUR_UNROLL
  for (int i = 0; i < kSteps<kType>; ++i) {
    const int unit = unit_of<kType>(i), step = step_of<kType>(i);
    gpu::Fragment b[kTokenTiles];
    TWOFOUR_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) b[n] = load_b<kType, kKeep>(x_rows[n], unit, step, lane);
    TWOFOUR_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      const Operand<kKeep> a = load_a<kType, kKeep>(blocks + r * block_bytes(kForm), positions[r], unit, step, lane);
      TWOFOUR_UNROLL
      for (int n = 0; n < kTokenTiles; ++n) multiply_step<kType>(sums[r][n], a, b[n], step);
    }
  }
}

// The same for one block, with all of x in registers.
template <int kType, int kKeep, int kTokenTiles, class Accumulator>
TWOFOUR_DEVICE void multiply_block(const uint8_t* block, const gpu::Fragment (&x)[kSteps<kType>][kTokenTiles], int lane,
                                   Accumulator (&sums)[kTokenTiles][4]) {
  const gpu::Fragment positions = load_positions<kType, kKeep>(block, lane);
  TWOFOUR_UNROLL
  for (int i = 0; i < kSteps<kType>; ++i) {
    const int unit = unit_of<kType>(i), step = step_of<kType>(i);
    const Operand<kKeep> a = load_a<kType, kKeep>(block, positions, unit, step, lane);
    TWOFOUR_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) multiply_step<kType>(sums[n], a, x[i][n], step);
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
