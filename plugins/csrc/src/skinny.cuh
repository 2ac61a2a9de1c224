// The skinny GEMM: y[tokens, N] = scale * (x[tokens, K] w[N, K]^T) + bias for few tokens, w packed as in layout.h.
//
// At 1 to 64 tokens reading the weight bounds the time, so the kernel streams w by 16-byte asynchronous copies into
// a ring of shared-memory stages, multiplied on sparse tensor cores with the weight as the (sparse) A operand and the
// tokens as the 8 columns of B. A thread block owns 4 warps x RowTiles x 16 output features, all of its tokens, and one
// of `splits` ranges of K. Each lane copies exactly the bytes it later reads; only x is shared between the warps.
// Partial sums of a split go to the workspace, and the last block of a tile to arrive adds them in order: the
// result does not depend on the order of arrival. The counters return to 0, so a CUDA graph may replay the launch.
#pragma once

#include <type_traits>

#include "fragments.cuh"

namespace twofour {

constexpr int kMostShared = 99 * 1024;  // of a thread block on every GPU with sparse tensor cores

template <int kType, int kTokenTiles, int kRowTiles, int kStages, int kKeep>
struct SkinnyConfig {
  static constexpr int type = kType, keep = kKeep, token_tiles = kTokenTiles, warp_tiles = kRowTiles, stages = kStages;
  static constexpr int packed_bytes = block_bytes({type, keep});  // of a block
  static constexpr int warps = 4, threads = warps * kLanes;
  static constexpr int tiles = warps * warp_tiles;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int x_bytes = kBlockInputs * element_bytes(type);
  static constexpr int x_pitch = x_bytes + kRowPadding<type, keep>;
  static constexpr int weight_stage_bytes = tiles * packed_bytes;
  static constexpr int stage_bytes = weight_stage_bytes + tokens * x_pitch;
  static constexpr int shared_bytes = stages * stage_bytes;
  static constexpr int accumulators = warp_tiles * token_tiles * 4;  // of a thread, 32 bits each
  static_assert(shared_bytes <= kMostShared, "does not fit sm_86");
};

// As many stages as fit, up to four.
template <int kType, int kTokenTiles, int kKeep>
constexpr int kStagesOf8 = SkinnyConfig<kType, kTokenTiles, 1, 1, kKeep>::stage_bytes * 4 <= kMostShared ? 4
                           : SkinnyConfig<kType, kTokenTiles, 1, 1, kKeep>::stage_bytes * 3 <= kMostShared ? 3 : 2;

// The configuration for a number of tokens.
template <int kType, int kTokenTiles, int kKeep>
using SkinnyChoice = std::conditional_t<
    kKeep == kKeep2of4,
    SkinnyConfig<kType, kTokenTiles, element_bytes(kType) == 2 || kTokenTiles == 1 ? 1 : 2,
                 kTokenTiles == 1 ? 4 : element_bytes(kType) == 2 && kTokenTiles == 4 ? 2 : 3, kKeep>,
    SkinnyConfig<kType, kTokenTiles, 1, kStagesOf8<kType, kTokenTiles, kKeep>, kKeep>>;

template <class C>
TWOFOUR_DEVICE void load_stage(const SkinnyProblem& p, uint8_t* stage, int64_t block) {
  const int thread = gpu::thread(), warp = thread / kLanes, lane = thread % kLanes;
  for (int r = 0; r < C::warp_tiles; ++r) {
    const int tile = warp * C::warp_tiles + r;
    const int64_t global_tile = static_cast<int64_t>(gpu::block_y()) * C::tiles + tile;
    if (global_tile >= row_tiles(p.out_features)) break;
    const uint8_t* source = p.weight + (global_tile * input_blocks(p.in_features) + block) * C::packed_bytes;
    uint8_t* target = stage + tile * C::packed_bytes;
    TWOFOUR_UNROLL
    for (int c = 0; c < chunks({C::type, C::keep}); ++c) {
      const int offset = (c * kLanes + lane) * kChunkBytes;
      gpu::copy_weight(target + offset, source + offset);
    }
  }
  constexpr int row_chunks = C::x_bytes / kChunkBytes;
  const int64_t row_bytes = p.in_features * element_bytes(C::type), row_pitch = p.x_pitch * element_bytes(C::type);
  uint8_t* x_stage = stage + C::weight_stage_bytes;
  for (int i = thread; i < C::tokens * row_chunks; i += C::threads) {
    const int token = gpu::block_x() * C::tokens + i / row_chunks;
    const int64_t offset = block * C::x_bytes + i % row_chunks * kChunkBytes;
    const bool inside = token < p.tokens && offset < row_bytes;  // outside: zeros, never read
    gpu::copy_or_zero(x_stage + i / row_chunks * C::x_pitch + i % row_chunks * kChunkBytes,
                      inside ? p.x + token * row_pitch + offset : p.x, inside);
  }
}

template <class C, class Accumulator>
TWOFOUR_DEVICE void multiply_stage(const uint8_t* stage, bool active,
                                   Accumulator (&sums)[C::warp_tiles][C::token_tiles][4]) {
  const int thread = gpu::thread(), warp = thread / kLanes, lane = thread % kLanes;
  if (!active) return;  // a warp beyond the last row: its shared memory holds nothing
  const uint8_t* x_rows[C::token_tiles];
  TWOFOUR_UNROLL
  for (int n = 0; n < C::token_tiles; ++n)
    x_rows[n] = stage + C::weight_stage_bytes + (8 * n + token_of_lane<C::type, C::keep>(lane)) * C::x_pitch;
  multiply_blocks<C::type, C::keep>(stage + warp * C::warp_tiles * C::packed_bytes, x_rows, lane, sums);
}

template <class C, class Accumulator>
TWOFOUR_DEVICE void store_outputs(const SkinnyProblem& p, const Accumulator (&sums)[C::warp_tiles][C::token_tiles][4]) {
  const int thread = gpu::thread(), warp = thread / kLanes, lane = thread % kLanes;
  const int64_t first_tile = static_cast<int64_t>(gpu::block_y()) * C::tiles + warp * C::warp_tiles;
  TWOFOUR_UNROLL
  for (int i = 0; i < C::accumulators; ++i) {
    const int r = i / (4 * C::token_tiles), n = i / 4 % C::token_tiles, c = i % 4;
    store_output(p, (first_tile + r) * kTileRows + row_of_sum(lane, c),
                 gpu::block_x() * C::tokens + 8 * n + token_of_sum(lane, c), sums[r][n][c]);
  }
}

// Adds the partial sums of all splits of this tile. False in every block but the last to arrive.
template <class C, class Accumulator>
TWOFOUR_DEVICE bool reduce_splits(const SkinnyProblem& p, uint8_t* shared,
                                  Accumulator (&sums)[C::warp_tiles][C::token_tiles][4]) {
  const int thread = gpu::thread();
  const int64_t tile = static_cast<int64_t>(gpu::block_y()) * gpu::grid_x() + gpu::block_x();
  uint32_t* partials = p.partials + tile * p.splits * C::accumulators * C::threads + thread;
  TWOFOUR_UNROLL
  for (int i = 0; i < C::accumulators; ++i)
    gpu::store_partial(partials + (gpu::block_z() * C::accumulators + i) * C::threads,
                       sums[i / (4 * C::token_tiles)][i / 4 % C::token_tiles][i % 4]);
  gpu::fence();
  gpu::block_sync();  // and no warp reads the stages any more
  unsigned* arrived = reinterpret_cast<unsigned*>(shared);
  if (thread == 0) *arrived = gpu::fetch_add(p.counters + tile);
  gpu::block_sync();
  if (*arrived != static_cast<unsigned>(p.splits - 1)) return false;
  gpu::fence();
  if (thread == 0) p.counters[tile] = 0;
  TWOFOUR_UNROLL
  for (int i = 0; i < C::accumulators; ++i) sums[i / (4 * C::token_tiles)][i / 4 % C::token_tiles][i % 4] = 0;
  for (int s = 0; s < p.splits; ++s) {
    TWOFOUR_UNROLL
    for (int i = 0; i < C::accumulators; ++i)
      sums[i / (4 * C::token_tiles)][i / 4 % C::token_tiles][i % 4] +=
          gpu::load_partial<Accumulator>(partials + (s * C::accumulators + i) * C::threads);
  }
  return true;
}

// Grid: x the tiles of tokens (neighbours read the same weights, from L2), y the tiles of output features, z the splits.
template <class C>
TWOFOUR_DEVICE void skinny_block(const SkinnyProblem& p, uint8_t* shared) {
  using Accumulator = typename gpu::Accumulator<C::type>::Type;
  const int64_t blocks = input_blocks(p.in_features);
  const int64_t begin = blocks * gpu::block_z() / p.splits, end = blocks * (gpu::block_z() + 1) / p.splits;
  const int warp = gpu::thread() / kLanes;
  const bool active = static_cast<int64_t>(gpu::block_y()) * C::tiles + warp * C::warp_tiles < row_tiles(p.out_features);

  Accumulator sums[C::warp_tiles][C::token_tiles][4] = {};
  for (int s = 0; s < C::stages - 1; ++s) {
    if (begin + s < end) load_stage<C>(p, shared + s * C::stage_bytes, begin + s);
    gpu::commit();
  }
  int slot = 0;
  for (int64_t block = begin; block < end; ++block) {
    gpu::wait<C::stages - 2>();
    gpu::block_sync();  // this stage has landed for all, and all have left the stage that is refilled next
    const int ahead = C::stages - 1, refill = (slot + ahead) % C::stages;
    if (block + ahead < end) load_stage<C>(p, shared + refill * C::stage_bytes, block + ahead);
    gpu::commit();
    multiply_stage<C>(shared + slot * C::stage_bytes, active, sums);
    slot = (slot + 1) % C::stages;
  }
  if (p.splits > 1 && !reduce_splits<C>(p, shared, sums)) return;
  store_outputs<C>(p, sums);
}

}  // namespace twofour
