// The streamed skinny kernel, for GPUs with bulk copies and programmatic dependent launch (SM90 and newer).
//
// One thread block a multiprocessor stays for the whole product. It owns a range of 16-row tiles and of 256-input blocks
// of the weight, which every one of them gets in nearly equal share. Each of its eight warps takes every eighth block of a
// tile and streams them through a ring of its own: one bulk copy a packed block, counted by the slot's barrier in shared
// memory. Weights depend on no earlier kernel, so the rings are filled before the launch waits for the kernel before it; x
// follows, once, for the whole range of inputs. A warp waits for its next slot alone, multiplies and refills it: there is
// no barrier of the thread block until a tile ends, where the sums of the warps are added in order. Where the inputs are split over thread blocks, partial sums
// go to the workspace, and the last thread block to arrive adds those of its rows, in order too: the result depends
// neither on the order of arrival nor on the number of multiprocessors. No thread block waits for another one.
#pragma once

#include "fragments.cuh"

namespace twofour {

template <int kType, int kTokenTiles, int kTiles>
struct StreamedConfig {
  static constexpr int type = kType, token_tiles = kTokenTiles, tiles = kTiles;  // of 16 rows, which share loads of x
  static constexpr int warps = 8, threads = warps * kLanes;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int x_bytes = kBlockInputs * element_bytes(type);
  static constexpr int slot_bytes = tiles * block_bytes(type);
  static constexpr int tile_sums = token_tiles * 4 * kLanes;  // of 16 rows and all tokens
  static constexpr int group_sums = tiles * tile_sums;
  static constexpr int sums_bytes = 2 * warps * group_sums * 4;  // two buffers: one is read while the other is written

  // Shared memory: a ring of `depth` slots for each warp | sums | barriers | x.
  TWOFOUR_HD static constexpr int sums_offset(int depth) { return depth * warps * slot_bytes; }
  TWOFOUR_HD static constexpr int barriers_offset(int depth) { return sums_offset(depth) + sums_bytes; }
  TWOFOUR_HD static constexpr int x_offset(int depth) { return barriers_offset(depth) + depth * warps * 8; }
  // 16 bytes more than the inputs: 8 rows of ldmatrix hit 8 different banks.
  TWOFOUR_HD static constexpr int64_t x_pitch(int64_t blocks) { return blocks * x_bytes + kChunkBytes; }
  // Rows of x kept: the tokens', and one of zeros for all that are missing.
  TWOFOUR_HD static constexpr int x_rows(int tokens_here) { return tokens_here < tokens ? tokens_here + 1 : tokens; }
};

// 8-bit x is widened for each use, and then two tiles share it; registers of one token tile do without.
template <int kType, int kTokenTiles>
using StreamedChoice = StreamedConfig<kType, kTokenTiles, element_bytes(kType) == 2 || kTokenTiles == 1 ? 1 : 2>;

// What a thread block multiplies: 16-row tiles and 256-input blocks of the weight.
struct Range {
  int64_t tile, block;  // the first
  int tiles, blocks;
};

// Thread block `index` of `count`. `splits` neighbours share the rows and have a range of inputs each.
TWOFOUR_HD constexpr Range range_of(const SkinnyProblem& p, int index, int count) {
  const int64_t group = index / p.splits, groups = count / p.splits, split = index % p.splits;
  const int64_t tiles = row_tiles(p.out_features), blocks = input_blocks(p.in_features);
  const int64_t tile = tiles * group / groups, block = blocks * split / p.splits;
  return {tile, block, static_cast<int>(tiles * (group + 1) / groups - tile),
          static_cast<int>(blocks * (split + 1) / p.splits - block)};
}

// A packed block of a group of tiles, as the warp whose turn it is goes through them.
struct Item {
  int group, block;
  template <class C>
  TWOFOUR_DEVICE void advance(int warp, int blocks) {
    block += C::warps;
    if (block >= blocks) block = warp, ++group;
  }
};

// Starts the copies of an item's packed blocks, which are one `row_bytes` apart.
template <class C>
TWOFOUR_DEVICE void fill_slot(const uint8_t* weight, int64_t row_bytes, int tiles, Item item, uint8_t* slot,
                              uint64_t* barrier) {
  const int first = item.group * C::tiles, active = tiles - first < C::tiles ? tiles - first : C::tiles;
  const uint8_t* source = weight + first * row_bytes + static_cast<int64_t>(item.block) * block_bytes(C::type);
  gpu::expect_bytes(barrier, active * block_bytes(C::type));
  TWOFOUR_UNROLL
  for (int r = 0; r < C::tiles; ++r)
    if (r < active) gpu::bulk_copy(slot + r * block_bytes(C::type), source + r * row_bytes, block_bytes(C::type), barrier);
}

// x of this thread block's tokens and inputs, with zeros beyond either.
template <class C>
TWOFOUR_DEVICE void load_x(const SkinnyProblem& p, const Range& range, int tokens_here, uint8_t* x, int64_t pitch) {
  const int64_t row_bytes = p.in_features * element_bytes(C::type);
  const int64_t first_byte = range.block * C::x_bytes, bytes = static_cast<int64_t>(range.blocks) * C::x_bytes;
  const uint8_t* source = p.x + gpu::block_y() * C::tokens * row_bytes + first_byte;
  for (int row = 0; row < C::x_rows(tokens_here); ++row)
    for (int64_t at = gpu::thread() * kChunkBytes; at < bytes; at += C::threads * kChunkBytes) {
      const bool inside = row < tokens_here && first_byte + at < row_bytes;
      gpu::copy_or_zero(x + row * pitch + at, inside ? source + row * row_bytes + at : p.x, inside);
    }
  gpu::commit();
  gpu::wait<0>();
}

// y from sum `at` (0 to C::tile_sums) of a tile.
template <class C, class Accumulator>
TWOFOUR_DEVICE void store_tile_sum(const SkinnyProblem& p, int64_t tile, int at, Accumulator sum) {
  const int lane = at % kLanes, c = at / kLanes % 4, n = at / (4 * kLanes);
  store_output(p, tile * kTileRows + row_of_sum(lane, c), gpu::block_y() * C::tokens + 8 * n + token_of_sum(lane, c), sum);
}

// Where the partial sums of a tile begin in the workspace.
template <class C>
TWOFOUR_DEVICE uint32_t* partials_of(const SkinnyProblem& p, int split, int64_t tile) {
  const int64_t token_blocks = ceil_div(p.tokens, C::tokens);
  return p.partials + ((split * token_blocks + gpu::block_y()) * row_tiles(p.out_features) + tile) * C::tile_sums;
}

// Adds the warps' sums of a group of tiles, and stores y or this split's part of it.
template <class C, class Accumulator>
TWOFOUR_DEVICE void add_warps(const SkinnyProblem& p, const Accumulator* sums, int64_t first_tile, int tiles) {
  for (int i = gpu::thread(); i < C::group_sums; i += C::threads) {
    const int r = i / C::tile_sums, at = i % C::tile_sums;
    if (r >= tiles) return;
    Accumulator sum = sums[i];
    TWOFOUR_UNROLL
    for (int warp = 1; warp < C::warps; ++warp) sum += sums[warp * C::group_sums + i];
    if (p.splits == 1) store_tile_sum<C>(p, first_tile + r, at, sum);
    else gpu::store_partial(partials_of<C>(p, gpu::block_x() % p.splits, first_tile + r) + at, sum);
  }
}

// The last of the `splits` thread blocks of these rows to arrive adds their partial sums.
template <class C>
TWOFOUR_DEVICE void add_splits(const SkinnyProblem& p, const Range& range, unsigned* shared) {
  using Accumulator = typename gpu::Accumulator<C::type>::Type;
  gpu::fence();
  gpu::block_sync();
  unsigned* counter = p.counters + gpu::block_y() * (gpu::grid_x() / p.splits) + gpu::block_x() / p.splits;
  if (gpu::thread() == 0) *shared = gpu::fetch_add(counter);
  gpu::block_sync();
  if (*shared != static_cast<unsigned>(p.splits - 1)) return;
  gpu::fence();
  if (gpu::thread() == 0) *counter = 0;
  for (int i = gpu::thread(); i < range.tiles * C::tile_sums; i += C::threads) {
    const int64_t tile = range.tile + i / C::tile_sums;
    Accumulator sum = 0;
    for (int split = 0; split < p.splits; ++split)
      sum += gpu::load_partial<Accumulator>(partials_of<C>(p, split, tile) + i % C::tile_sums);
    store_tile_sum<C>(p, tile, i % C::tile_sums, sum);
  }
}

// Grid: x the ranges, y the tiles of tokens. `shared` holds what streamed_plan (streamed.h) says, 128-byte aligned.
template <class C>
TWOFOUR_DEVICE void streamed_block(const SkinnyProblem& p, uint8_t* shared) {
  using Accumulator = typename gpu::Accumulator<C::type>::Type;
  const int warp = gpu::thread() / kLanes, lane = gpu::thread() % kLanes;
  const Range range = range_of(p, gpu::block_x(), gpu::grid_x());
  const int groups = static_cast<int>(ceil_div(range.tiles, C::tiles));
  const int64_t row_bytes = input_blocks(p.in_features) * block_bytes(C::type);
  const uint8_t* weight = p.weight + range.tile * row_bytes + range.block * block_bytes(C::type);
  uint8_t* const ring = shared + warp * p.depth * C::slot_bytes;
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared + C::sums_offset(p.depth));
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + C::barriers_offset(p.depth)) + warp * p.depth;
  uint8_t* const x = shared + C::x_offset(p.depth);

  Item ahead{warp < range.blocks ? 0 : groups, warp};  // what is copied next
  const auto fill = [&](int slot) {
    if (lane == 0 && ahead.group < groups)
      fill_slot<C>(weight, row_bytes, range.tiles, ahead, ring + slot * C::slot_bytes, barriers + slot);
    ahead.advance<C>(warp, range.blocks);
  };
  if (lane == 0) {
    for (int slot = 0; slot < p.depth; ++slot) gpu::init_barrier(barriers + slot);
    gpu::publish_barriers();
  }
  for (int slot = 0; slot < p.depth; ++slot) fill(slot);
  gpu::let_next_kernel_start();
  gpu::wait_for_previous_kernel();  // x, and y's memory, may have been its

  const int tokens_left = p.tokens - gpu::block_y() * C::tokens, tokens_here = tokens_left < C::tokens ? tokens_left : C::tokens;
  const int64_t pitch = C::x_pitch(range.blocks);
  load_x<C>(p, range, tokens_here, x, pitch);
  gpu::block_sync();
  const uint8_t* x_tokens[C::token_tiles];
  TWOFOUR_UNROLL
  for (int n = 0; n < C::token_tiles; ++n) {
    const int token = 8 * n + token_of_lane<C::type>(lane);
    x_tokens[n] = x + (token < tokens_here ? token : tokens_here) * pitch;
  }

  int slot = 0;
  unsigned parity = 0;  // of the phase of its barrier; flips with each turn of the ring
  for (int group = 0; group < groups; ++group) {
    Accumulator own[C::tiles][C::token_tiles][4] = {};
    for (int block = warp; block < range.blocks; block += C::warps) {
      const uint8_t* x_rows[C::token_tiles];
      TWOFOUR_UNROLL
      for (int n = 0; n < C::token_tiles; ++n) x_rows[n] = x_tokens[n] + block * C::x_bytes;
      gpu::wait_phase(barriers + slot, parity);
      multiply_blocks<C::type>(ring + slot * C::slot_bytes, x_rows, lane, own);
      gpu::warp_sync();  // all lanes have read it
      fill(slot);
      if (++slot == p.depth) slot = 0, parity ^= 1u;
    }
    Accumulator* const buffer = sums + group % 2 * C::warps * C::group_sums;
    TWOFOUR_UNROLL
    for (int i = 0; i < C::group_sums / kLanes; ++i)
      buffer[warp * C::group_sums + i * kLanes + lane] = own[i / (4 * C::token_tiles)][i / 4 % C::token_tiles][i % 4];
    gpu::block_sync();
    add_warps<C>(p, buffer, range.tile + group * C::tiles, range.tiles - group * C::tiles);
  }
  if (p.splits > 1 && groups > 0) add_splits<C>(p, range, reinterpret_cast<unsigned*>(shared));
}

}  // namespace twofour
