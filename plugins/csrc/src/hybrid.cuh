// The streamed kernel of a weight that holds a pattern in its first rows or inputs and is dense in the others.
//
// Rows: a thread block has a range of the sparse rows or of the dense ones, as many thread blocks each as even out the bytes.
// Inputs: a thread block has a range of rows, and multiplies its sparse inputs and then its dense ones into the same sums;
// where the inputs are split over thread blocks, each has nearly the same bytes of both together.
// The bytes of one product bound the time: 1 - 0.375 f of the dense ones at 8 bit where a share f is 2:4.
#pragma once

#include "hybrid_problem.h"
#include "streamed.cuh"

namespace twofour {

template <int kType, int kTokenTiles, int kKeep>
struct HybridConfig {
  static constexpr int type = kType, keep = kKeep, token_tiles = kTokenTiles;
  static constexpr int tiles = StreamedChoice<kType, kTokenTiles, kKeepAll>::tiles;  // of a group, for both
  using Sparse = StreamedConfig<kType, kTokenTiles, tiles, kKeep>;
  using Dense = StreamedConfig<kType, kTokenTiles, tiles, kKeepAll>;
  static constexpr int warps = Dense::warps, threads = Dense::threads, tokens = Dense::tokens;
  static constexpr int slot_bytes = Dense::slot_bytes > Sparse::slot_bytes ? Dense::slot_bytes : Sparse::slot_bytes;

  // Shared memory as that of StreamedConfig, but for a slot that holds either block: barriers and x of sparse inputs, then
  // of dense ones.
  TWOFOUR_HD static constexpr int sums_offset(int depth) { return depth * warps * slot_bytes; }
  TWOFOUR_HD static constexpr int barriers_offset(int depth) { return sums_offset(depth) + Dense::sums_bytes; }
  TWOFOUR_HD static constexpr int x_barriers_offset(int depth) { return barriers_offset(depth) + depth * warps * 8; }
  TWOFOUR_HD static constexpr int64_t x_offset(int depth, int64_t blocks) {
    return x_barriers_offset(depth) + (blocks + 1) / 2 * 16;
  }
  TWOFOUR_HD static constexpr int64_t x_bytes(int tokens_here, int64_t sparse_blocks, int64_t dense_blocks) {
    return Dense::x_rows(tokens_here) * (Sparse::x_pitch(sparse_blocks) + Dense::x_pitch(dense_blocks));
  }
};

template <int kType, int kTokenTiles, int kKeep>
using HybridChoice = HybridConfig<kType, kTokenTiles, kKeep>;

// The share of a thread block: the same tiles of both where the inputs divide, else one of the two without blocks.
struct HybridRange {
  Range sparse, dense;
};

// Where split `split` begins among the blocks of inputs, the sparse ones first: nearly the same bytes in each.
template <class H>
TWOFOUR_HD constexpr int64_t split_begin(int64_t sparse_blocks, int64_t dense_blocks, int64_t split, int64_t splits) {
  const int64_t sparse_bytes = sparse_blocks * H::Sparse::slot_bytes;
  const int64_t at = (sparse_bytes + dense_blocks * H::Dense::slot_bytes) * split / splits;
  if (at <= sparse_bytes) return at / H::Sparse::slot_bytes;
  return sparse_blocks + (at - sparse_bytes) / H::Dense::slot_bytes;
}

// Thread block `index` of `count`.
template <class H>
TWOFOUR_HD constexpr HybridRange hybrid_range(const HybridProblem& p, int index, int count) {
  const int splits = p.sparse.splits, first_dense = p.sparse_groups * splits;
  if (p.by_rows && index < first_dense) return {range_of(p.sparse, index, first_dense), {0, 0, 0, 0}};
  if (p.by_rows) return {{0, 0, 0, 0}, range_of(p.dense, index - first_dense, count - first_dense)};
  const int64_t sparse_blocks = input_blocks(p.sparse.in_features), dense_blocks = input_blocks(p.dense.in_features);
  const int64_t begin = split_begin<H>(sparse_blocks, dense_blocks, index % splits, splits);
  const int64_t end = split_begin<H>(sparse_blocks, dense_blocks, index % splits + 1, splits);
  const int64_t from = begin < sparse_blocks ? begin : sparse_blocks, to = end < sparse_blocks ? end : sparse_blocks;
  const Range rows = range_of(p.sparse, index, count);
  return {{rows.tile, from, rows.tiles, static_cast<int>(to - from)},
          {rows.tile, begin - from, rows.tiles, static_cast<int>(end - to - (begin - from))}};
}

// The packed blocks of a warp, in its order: groups of tiles, in each its sparse inputs and then its dense ones, of these
// one block of each tile.
template <class H>
class HybridStream {
 public:
  TWOFOUR_DEVICE HybridStream(const HybridProblem& p, const HybridRange& range, int warp)
      : sparse_rows_(input_blocks(p.sparse.in_features) * H::Sparse::slot_bytes),
        dense_rows_(input_blocks(p.dense.in_features) * H::Dense::slot_bytes),
        sparse_(p.sparse.weight + range.sparse.tile * sparse_rows_ + range.sparse.block * H::Sparse::slot_bytes),
        dense_(p.dense.weight + range.dense.tile * dense_rows_ + range.dense.block * H::Dense::slot_bytes),
        tiles_(range.sparse.tiles > range.dense.tiles ? range.sparse.tiles : range.dense.tiles),
        sparse_blocks_(range.sparse.blocks), blocks_(range.sparse.blocks + range.dense.blocks), warp_(warp), block_(warp),
        tile_(warp < blocks_ ? 0 : tiles_) {
    begin_group(tile_);
  }
  TWOFOUR_DEVICE bool ended() const { return tile_ >= tiles_; }
  TWOFOUR_DEVICE const uint8_t* source() const { return source_; }
  TWOFOUR_DEVICE int bytes() const { return block_ < sparse_blocks_ ? H::Sparse::slot_bytes : H::Dense::slot_bytes; }
  TWOFOUR_DEVICE void advance() {
    ++tile_;
    source_ += block_ < sparse_blocks_ ? sparse_rows_ : dense_rows_;
    if (tile_ < end_) return;
    block_ += H::warps;
    if (block_ < blocks_) {
      tile_ = begin_;
      locate();
    } else {
      block_ = warp_;
      begin_group(tile_);
    }
  }

 private:
  TWOFOUR_DEVICE void begin_group(int tile) {
    begin_ = tile;
    end_ = tile + H::tiles < tiles_ ? tile + H::tiles : tiles_;
    locate();
  }
  TWOFOUR_DEVICE void locate() {
    if (block_ < sparse_blocks_)
      source_ = sparse_ + begin_ * sparse_rows_ + static_cast<int64_t>(block_) * H::Sparse::slot_bytes;
    else source_ = dense_ + begin_ * dense_rows_ + static_cast<int64_t>(block_ - sparse_blocks_) * H::Dense::slot_bytes;
  }

  int64_t sparse_rows_, dense_rows_;  // bytes of a tile
  const uint8_t *sparse_, *dense_, *source_;
  int tiles_, sparse_blocks_, blocks_, warp_, block_, tile_, begin_, end_;  // of the thread block; of the group: the last two
};

// Grid: x the ranges, y the tiles of tokens. `shared` has the size that hybrid_plan (hybrid.h) returns, 128-byte aligned.
template <class H>
TWOFOUR_DEVICE void hybrid_block(const HybridProblem& p, uint8_t* shared) {
  using Sparse = typename H::Sparse;
  using Dense = typename H::Dense;
  using Accumulator = typename gpu::Accumulator<H::type>::Type;
  const int warp = gpu::thread() / kLanes, lane = gpu::thread() % kLanes, depth = p.sparse.depth;
  const HybridRange range = hybrid_range<H>(p, gpu::block_x(), gpu::grid_x());
  const int sparse_blocks = range.sparse.blocks, dense_blocks = range.dense.blocks, blocks = sparse_blocks + dense_blocks;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + H::barriers_offset(depth)) + warp * depth;
  uint64_t* const x_barriers = reinterpret_cast<uint64_t*>(shared + H::x_barriers_offset(depth));

  if (lane == 0) {
    for (int slot = 0; slot < depth; ++slot) gpu::init_barrier(barriers + slot, 1);
    for (int block = warp; block < blocks; block += H::warps) gpu::init_barrier(x_barriers + block, kLanes);
    gpu::publish_barriers();
  }
  gpu::warp_sync();
  Ring<HybridStream<H>, H::slot_bytes> ring(HybridStream<H>(p, range, warp), shared + warp * depth * H::slot_bytes, barriers,
                                            depth, lane);
  ring.start(p.sparse.prefetch);
  gpu::let_next_kernel_start();
  gpu::wait_for_previous_kernel();  // that kernel may write x and read y's memory

  const int tokens_here = tokens_of_block<Dense>(p.dense);
  const int64_t sparse_pitch = Sparse::x_pitch(sparse_blocks), dense_pitch = Dense::x_pitch(dense_blocks);
  uint8_t* const sparse_x = shared + H::x_offset(depth, blocks);
  uint8_t* const dense_x = sparse_x + Dense::x_rows(tokens_here) * sparse_pitch;
  // Of all blocks a warp has every eighth one: its first dense one, where a sparse one comes before it.
  const int first_dense = (warp + H::warps - sparse_blocks % H::warps) % H::warps;
  load_x<Sparse>(p.sparse, range.sparse, tokens_here, warp, lane, sparse_x, sparse_pitch, x_barriers);
  load_x<Dense>(p.dense, range.dense, tokens_here, first_dense, lane, dense_x, dense_pitch, x_barriers + sparse_blocks);

  const bool dense_rows = p.by_rows && sparse_blocks == 0;
  const SkinnyProblem& own_part = dense_rows ? p.dense : p.sparse;
  const Range& rows = dense_rows ? range.dense : range.sparse;
  for (int tile = 0; tile < rows.tiles; tile += H::tiles) {
    const int active = rows.tiles - tile < H::tiles ? rows.tiles - tile : H::tiles;
    Accumulator own[H::tiles][H::token_tiles][4] = {};
    const uint8_t* x_tokens[H::token_tiles];
    locate_x<Sparse>(sparse_x, tokens_here, sparse_pitch, lane, x_tokens);
    for (int block = warp; block < sparse_blocks; block += H::warps) {
      gpu::wait_phase(x_barriers + block, 0);
      multiply_tiles<Sparse>(ring, x_tokens, block, active, lane, own);
    }
    locate_x<Dense>(dense_x, tokens_here, dense_pitch, lane, x_tokens);
    for (int block = first_dense; block < dense_blocks; block += H::warps) {
      gpu::wait_phase(x_barriers + sparse_blocks + block, 0);
      multiply_tiles<Dense>(ring, x_tokens, block, active, lane, own);
    }
    if (tile > 0) gpu::block_sync();  // the sums of the group before have been read
    add_warps<Dense>(own_part, own, reinterpret_cast<Accumulator*>(shared + H::sums_offset(depth)), warp, lane,
                     rows.tile + tile, active);
  }
  if (p.sparse.splits > 1 && rows.tiles > 0) add_splits<Dense>(own_part, rows, reinterpret_cast<unsigned*>(shared));
}

}  // namespace twofour
