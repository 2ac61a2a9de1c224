// The skinny kernel simulated on the CPU, and the geometry, which GPU and simulation share.
#include "simt.h"
#include "skinny.cuh"

#include <algorithm>

#include "skinny_dispatch.h"

namespace twofour {

SkinnyGeometry skinny_geometry(Form form, int64_t tokens, int64_t out_features, int64_t in_features) {
  SkinnyGeometry g{};
  dispatch<SkinnyChoice>(form, tokens, [&](auto config) {
    using C = decltype(config);
    g.token_blocks = static_cast<int>(ceil_div(tokens, C::tokens));
    g.row_blocks = ceil_div(row_tiles(out_features), C::tiles);
    const int64_t tiles = g.row_blocks * g.token_blocks;
    const int64_t most = std::min<int64_t>(kMaxSplits, input_blocks(in_features));
    g.max_splits = tiles <= kSkinnyCounters ? static_cast<int>(most) : 1;
    g.split_bytes = static_cast<size_t>(tiles) * C::accumulators * C::threads * sizeof(uint32_t);
  });
  return g;
}

int default_splits(const SkinnyGeometry& g, int multiprocessors) {
  constexpr int kBlocksPerMultiprocessor = 3;
  const int64_t tiles = g.row_blocks * g.token_blocks;
  const int64_t wanted = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  return static_cast<int>(std::clamp<int64_t>(wanted / tiles, 1, g.max_splits));
}

size_t skinny_workspace_bytes(const SkinnyGeometry& g, int splits) {
  return splits > 1 ? g.split_bytes * static_cast<size_t>(splits) : 0;
}

void skinny_simulate(Form form, const SkinnyProblem& problem) {
  const SkinnyGeometry g = skinny_geometry(form, problem.tokens, problem.out_features, problem.in_features);
  dispatch<SkinnyChoice>(form, problem.tokens, [&](auto config) {
    using C = decltype(config);
    const size_t x_bytes = x_extent(problem) * element_bytes(form.type);
    const size_t weight_bytes = packed_bytes(form, problem.out_features, problem.in_features);
    std::vector<uint8_t> memory(C::shared_bytes + 16);
    uint8_t* shared = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    // Splits in descending order: the block that reduces is not the one with the last range of K.
    for (int z = problem.splits - 1; z >= 0; --z)
      for (int y = 0; y < g.row_blocks; ++y)
        for (int x = 0; x < g.token_blocks; ++x) {
          std::fill(memory.begin(), memory.end(), uint8_t{0xCD});
          gpu::Block block{};
          block.x = x, block.y = y, block.z = z, block.grid_x = g.token_blocks;
          block.threads = C::threads;
          block.readable = {{problem.x, problem.x + x_bytes}, {problem.weight, problem.weight + weight_bytes}};
          block.body = [&] { skinny_block<C>(problem, shared); };
          gpu::run_block(block, static_cast<unsigned>(x + 3 * y + 7 * z));
        }
  });
}

}  // namespace twofour
