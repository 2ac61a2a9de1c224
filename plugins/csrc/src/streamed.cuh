// The streamed skinny kernel, for GPUs with bulk copies and programmatic dependent launch (SM90 and newer).
//
// One or two thread blocks a multiprocessor stay for the whole product. Each owns a range of 16-row tiles and of 256-input
// blocks of the weight, in nearly equal shares. Each of its eight warps takes every eighth block of a group of tiles and
// streams them through its own ring: one bulk copy a packed block, counted by the slot's barrier in shared memory.
// Weights depend on no earlier kernel, so the rings are filled, and the blocks after them prefetched into the L2, before the launch
// waits for the kernel before it. Then each warp loads the x of its blocks, once, and begins when the first is there. It keeps
// the x of a block in registers for all tiles of a group, waits for its next slot alone, multiplies and refills it: there is
// no barrier of the thread block until a group ends, where the sums of the warps are added in order. Where the inputs are split over thread blocks,
// partial sums go to the workspace, and the last thread block to arrive adds those of its rows, in order too: the result
// depends neither on the order of arrival nor on the number of multiprocessors. No thread block waits for another one.
#pragma once

#include "ring.cuh"

namespace twofour {

template <int kType, int kTokenTiles, int kTiles, int kKeep>
struct StreamedConfig {
  static constexpr int type = kType, keep = kKeep, token_tiles = kTokenTiles;
  static constexpr int tiles = kTiles;  // of 16 rows in a group
  static constexpr int warps = 8, threads = warps * kLanes;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int x_bytes = kBlockInputs * element_bytes(type);
  static constexpr int slot_bytes = block_bytes({type, keep});
  static constexpr int tile_sums = token_tiles * 4 * kLanes;  // of 16 rows and all tokens
  static constexpr int group_sums = tiles * tile_sums;
  static constexpr int sums_bytes = warps * group_sums * 4;
  static_assert(group_sums % threads == 0, "each thread adds as many");

  // Shared memory: a ring of `depth` slots for each warp | sums | barriers of slots | barriers of x | x.
  TWOFOUR_HD static constexpr int sums_offset(int depth) { return depth * warps * slot_bytes; }
  TWOFOUR_HD static constexpr int barriers_offset(int depth) { return sums_offset(depth) + sums_bytes; }
  TWOFOUR_HD static constexpr int x_barriers_offset(int depth) { return barriers_offset(depth) + depth * warps * 8; }
  TWOFOUR_HD static constexpr int64_t x_offset(int depth, int64_t blocks) {
    return x_barriers_offset(depth) + (blocks + 1) / 2 * 16;
  }
  TWOFOUR_HD static constexpr int64_t x_pitch(int64_t blocks) { return blocks * x_bytes + kRowPadding<type, keep>; }
  // Rows of x kept: the tokens', and one of zeros for all that are missing.
  TWOFOUR_HD static constexpr int x_rows(int tokens_here) { return tokens_here < tokens ? tokens_here + 1 : tokens; }
};

// As many tiles in a group as registers allow.
template <int kType, int kTokenTiles, int kKeep>
using StreamedChoice =
    StreamedConfig<kType, kTokenTiles,
                   kTokenTiles < 4 ? 4 : kKeep != kKeep2of4 && element_bytes(kType) == 2 ? 1 : 2, kKeep>;

// The share of a thread block: 16-row tiles and 256-input blocks of the weight.
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

// The packed blocks of a warp, in its order: groups of tiles, in each its inputs, of these one block of each tile.
template <class C>
class Stream {
 public:
  TWOFOUR_DEVICE Stream(const SkinnyProblem& p, const Range& range, int warp)
      : row_bytes_(input_blocks(p.in_features) * C::slot_bytes),
        base_(p.weight + range.tile * row_bytes_ + range.block * C::slot_bytes),
        tiles_(range.tiles), blocks_(range.blocks), warp_(warp), block_(warp), tile_(warp < blocks_ ? 0 : tiles_) {
    begin_group(tile_);
  }
  TWOFOUR_DEVICE bool ended() const { return tile_ >= tiles_; }
  TWOFOUR_DEVICE const uint8_t* source() const { return source_; }
  TWOFOUR_DEVICE static constexpr int bytes() { return C::slot_bytes; }
  TWOFOUR_DEVICE void advance() {
    ++tile_;
    source_ += row_bytes_;
    if (tile_ < end_) return;
    block_ += C::warps;
    if (block_ < blocks_) {
      tile_ = begin_;
      source_ = base_ + begin_ * row_bytes_ + static_cast<int64_t>(block_) * C::slot_bytes;
    } else {
      block_ = warp_;
      begin_group(tile_);
    }
  }

 private:
  TWOFOUR_DEVICE void begin_group(int tile) {
    begin_ = tile;
    end_ = tile + C::tiles < tiles_ ? tile + C::tiles : tiles_;
    source_ = base_ + begin_ * row_bytes_ + static_cast<int64_t>(block_) * C::slot_bytes;
  }

  int64_t row_bytes_;
  const uint8_t* base_;
  const uint8_t* source_;
  int tiles_, blocks_, warp_, block_, tile_, begin_, end_;  // of the thread block; of the group: begin_ and end_
};

// x of this thread block's tokens and a warp's inputs, `first_block` and every eighth block after it, with zeros beyond
// either. No other warp reads them.
template <class C>
TWOFOUR_DEVICE void load_x(const SkinnyProblem& p, const Range& range, int tokens_here, int first_block, int lane, uint8_t* x,
                           int64_t pitch, uint64_t* barriers) {
  constexpr int kChunks = C::x_bytes / kChunkBytes;  // of a token and a block
  const int64_t row_bytes = p.in_features * element_bytes(C::type), row_pitch = p.x_pitch * element_bytes(C::type);
  const uint8_t* source = p.x + gpu::block_y() * C::tokens * row_pitch;
  // All thread blocks read the same lines: each starts at another line, so that they do not queue at one L2 slice.
  const int chunks = C::x_rows(tokens_here) * kChunks, first = gpu::block_x() * kLanes % chunks + lane;
  for (int block = first_block; block < range.blocks; block += C::warps) {
    const int64_t first_byte = (range.block + block) * C::x_bytes;
    for (int n = lane, i = first; n < chunks; n += kLanes, i += kLanes) {
      if (i >= chunks) i -= chunks;
      const int row = i / kChunks, at = i % kChunks * kChunkBytes;
      const bool inside = row < tokens_here && first_byte + at < row_bytes;
      gpu::copy_or_zero(x + row * pitch + block * C::x_bytes + at, inside ? source + row * row_pitch + first_byte + at : p.x,
                        inside);
    }
    gpu::arrive_when_copied(barriers + block);
  }
}

// The tokens that a thread block has, of the 8 to 32 of its configuration.
template <class C>
TWOFOUR_DEVICE int tokens_of_block(const SkinnyProblem& p) {
  const int left = p.tokens - gpu::block_y() * C::tokens;
  return left < C::tokens ? left : C::tokens;
}

// Where x is in shared memory for the tokens that a lane loads.
template <class C>
TWOFOUR_DEVICE void locate_x(const uint8_t* x, int tokens_here, int64_t pitch, int lane,
                             const uint8_t* (&x_tokens)[C::token_tiles]) {
  TWOFOUR_UNROLL
  for (int n = 0; n < C::token_tiles; ++n) {
    const int token = 8 * n + token_of_lane<C::type, C::keep>(lane);
    x_tokens[n] = x + (token < tokens_here ? token : tokens_here) * pitch;
  }
}

// Multiplies the inputs at `block`, a block of x that is there, by the next packed block of each of the `active` tiles.
template <class C, class WarpRing, class Accumulator>
TWOFOUR_DEVICE void multiply_tiles(WarpRing& ring, const uint8_t* const (&x_tokens)[C::token_tiles], int block, int active,
                                   int lane, Accumulator (&own)[C::tiles][C::token_tiles][4]) {
  gpu::Fragment b[kSteps<C::type>][C::token_tiles];
  TWOFOUR_UNROLL
  for (int i = 0; i < kSteps<C::type>; ++i) {
    TWOFOUR_UNROLL
    for (int n = 0; n < C::token_tiles; ++n)
      b[i][n] = load_b<C::type, C::keep>(x_tokens[n] + block * C::x_bytes, unit_of<C::type>(i), step_of<C::type>(i), lane);
  }
  TWOFOUR_UNROLL
  for (int r = 0; r < C::tiles; ++r) {
    if (r >= active) break;
    multiply_block<C::type, C::keep>(ring.wait(), b, lane, own[r]);
    ring.release();
  }
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

// Adds the warps' sums of a group of tiles, by way of shared memory, and stores y or this split's part of it.
template <class C, class Accumulator>
TWOFOUR_DEVICE void add_warps(const SkinnyProblem& p, const Accumulator (&own)[C::tiles][C::token_tiles][4],
                              Accumulator* sums, int warp, int lane, int64_t first_tile, int tiles) {
  TWOFOUR_UNROLL
  for (int i = 0; i < C::group_sums / kLanes; ++i)
    sums[warp * C::group_sums + i * kLanes + lane] = own[i / (4 * C::token_tiles)][i / 4 % C::token_tiles][i % 4];
  gpu::block_sync();
  TWOFOUR_UNROLL
  for (int first = 0; first < C::group_sums; first += C::threads) {
    const int i = first + gpu::thread(), r = i / C::tile_sums, at = i % C::tile_sums;
    Accumulator sum = sums[i];
    TWOFOUR_UNROLL
    for (int other = 1; other < C::warps; ++other) sum += sums[other * C::group_sums + i];
    if (r >= tiles) continue;
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
  constexpr int kLoads = 4;  // under way at once
  const int count = range.tiles * C::tile_sums;
  for (int first = gpu::thread(); first < count; first += kLoads * C::threads) {
    Accumulator sums[kLoads] = {};
    for (int split = 0; split < p.splits; ++split) {
      const uint32_t* partials = partials_of<C>(p, split, range.tile);
      TWOFOUR_UNROLL
      for (int j = 0; j < kLoads; ++j)
        if (first + j * C::threads < count) sums[j] += gpu::load_partial<Accumulator>(partials + first + j * C::threads);
    }
    TWOFOUR_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * C::threads;
      if (i < count) store_tile_sum<C>(p, range.tile + i / C::tile_sums, i % C::tile_sums, sums[j]);
    }
  }
}

// Grid: x the ranges, y the tiles of tokens. `shared` has the size that streamed_plan (streamed.h) returns, 128-byte aligned.
template <class C>
TWOFOUR_DEVICE void streamed_block(const SkinnyProblem& p, uint8_t* shared) {
  using Accumulator = typename gpu::Accumulator<C::type>::Type;
  const int warp = gpu::thread() / kLanes, lane = gpu::thread() % kLanes;
  const Range range = range_of(p, gpu::block_x(), gpu::grid_x());
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + C::barriers_offset(p.depth)) + warp * p.depth;
  uint64_t* const x_barriers = reinterpret_cast<uint64_t*>(shared + C::x_barriers_offset(p.depth));
  uint8_t* const x = shared + C::x_offset(p.depth, range.blocks);

  if (lane == 0) {
    for (int slot = 0; slot < p.depth; ++slot) gpu::init_barrier(barriers + slot, 1);
    for (int block = warp; block < range.blocks; block += C::warps) gpu::init_barrier(x_barriers + block, kLanes);
    gpu::publish_barriers();
  }
  gpu::warp_sync();
  Ring<Stream<C>, C::slot_bytes> ring(Stream<C>(p, range, warp), shared + warp * p.depth * C::slot_bytes, barriers, p.depth, lane);
  ring.start(p.prefetch);
  gpu::let_next_kernel_start();
  gpu::wait_for_previous_kernel();  // that kernel may write x and read y's memory

  const int tokens_here = tokens_of_block<C>(p);
  const int64_t pitch = C::x_pitch(range.blocks);
  load_x<C>(p, range, tokens_here, warp, lane, x, pitch, x_barriers);
  const uint8_t* x_tokens[C::token_tiles];
  locate_x<C>(x, tokens_here, pitch, lane, x_tokens);
  for (int tile = 0; tile < range.tiles; tile += C::tiles) {
    const int active = range.tiles - tile < C::tiles ? range.tiles - tile : C::tiles;
    Accumulator own[C::tiles][C::token_tiles][4] = {};
    for (int block = warp; block < range.blocks; block += C::warps) {
      gpu::wait_phase(x_barriers + block, 0);
      multiply_tiles<C>(ring, x_tokens, block, active, lane, own);
    }
    if (tile > 0) gpu::block_sync();  // the sums of the group before have been read
    add_warps<C>(p, own, reinterpret_cast<Accumulator*>(shared + C::sums_offset(p.depth)), warp, lane, range.tile + tile, active);
  }
  if (p.splits > 1 && range.tiles > 0) add_splits<C>(p, range, reinterpret_cast<unsigned*>(shared));
}

}  // namespace twofour
