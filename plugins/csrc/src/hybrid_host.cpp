// The hybrid kernel simulated on the CPU, and the partition of a product, which GPU and simulation share.
#include "simt.h"
#include "hybrid.cuh"

#include <algorithm>

#include "hybrid.h"
#include "hybrid_dispatch.h"
#include "streamed_simulate.h"

namespace twofour {

namespace {

// Tiles and bytes of the busiest thread block of rows, and how many groups of thread blocks have sparse ones.
struct Rows {
  int64_t bytes, tiles;
  int sparse_groups;
};

int64_t tiles_of_busiest(int64_t tiles, int64_t groups) { return ceil_div(tiles, groups); }

// As even as whole tiles allow; `sparse` and `dense`: tiles of each and the bytes of one, of a split.
Rows divide_rows(int64_t sparse_tiles, int64_t sparse_bytes, int64_t dense_tiles, int64_t dense_bytes, int64_t groups) {
  Rows best{INT64_MAX, 0, 1};
  const int64_t first = std::max<int64_t>(1, groups - dense_tiles), last = std::min(groups - 1, sparse_tiles);
  for (int64_t sparse_groups = first; sparse_groups <= last; ++sparse_groups) {
    const int64_t sparse = tiles_of_busiest(sparse_tiles, sparse_groups);
    const int64_t dense = tiles_of_busiest(dense_tiles, groups - sparse_groups);
    const int64_t bytes = std::max(sparse * sparse_bytes, dense * dense_bytes);
    if (bytes < best.bytes) best = {bytes, std::max(sparse, dense), static_cast<int>(sparse_groups)};
  }
  return best;
}

struct Inputs {
  int64_t blocks, bytes, x;  // of the busiest thread block
};

// The most of any split: its blocks of inputs, bytes of a tile, and x in shared memory.
template <class H>
Inputs busiest_inputs(const Parts& parts, bool by_rows, int tokens_here, int splits) {
  const int64_t sparse = input_blocks(parts.sparse.in_features), dense = input_blocks(parts.dense.in_features);
  if (by_rows) {
    const int64_t blocks = ceil_div(sparse, splits);
    return {blocks, 0, std::max(H::x_bytes(tokens_here, blocks, 0), H::x_bytes(tokens_here, 0, blocks))};
  }
  Inputs most{};
  for (int split = 0; split < splits; ++split) {
    const int64_t begin = split_begin<H>(sparse, dense, split, splits), end = split_begin<H>(sparse, dense, split + 1, splits);
    const int64_t sparse_here = std::min(end, sparse) - std::min(begin, sparse), dense_here = end - begin - sparse_here;
    most.blocks = std::max(most.blocks, end - begin);
    most.bytes = std::max(most.bytes, sparse_here * H::Sparse::slot_bytes + dense_here * H::Dense::slot_bytes);
    most.x = std::max(most.x, H::x_bytes(tokens_here, sparse_here, dense_here));
  }
  return most;
}

struct Fit {
  HybridPlan plan;
  int64_t cost;  // bytes read while the busiest thread block runs
};

// The plan with these splits and this share of the shared memory; none where not even two slots a warp fit.
template <class H>
std::optional<Fit> fit(const twofour_gemm& g, const Multiprocessors& gpu, int splits, int share, int per_multiprocessor,
                       int prefetch) {
  const Parts parts = hybrid_parts(g);
  const bool by_rows = g.sparse_rows != 0;
  const int64_t sparse_tiles = row_tiles(parts.sparse.out_features), dense_tiles = row_tiles(parts.dense.out_features);
  const Inputs inputs = busiest_inputs<H>(parts, by_rows, static_cast<int>(std::min<int64_t>(g.tokens, H::tokens)), splits);
  const int64_t most_groups = by_rows ? sparse_tiles + dense_tiles : sparse_tiles;
  const int64_t groups = std::clamp<int64_t>(gpu.count * per_multiprocessor / splits, by_rows ? 2 : 1, most_groups);
  Rows rows{ceil_div(sparse_tiles, groups) * inputs.bytes, ceil_div(sparse_tiles, groups), 0};
  if (by_rows)
    rows = divide_rows(sparse_tiles, inputs.blocks * H::Sparse::slot_bytes, dense_tiles, inputs.blocks * H::Dense::slot_bytes, groups);

  const int64_t budget = streamed_budget(gpu, share, per_multiprocessor);
  const int64_t slots_of_warps = H::x_offset(1, inputs.blocks) - H::x_offset(0, inputs.blocks);
  const int64_t rest = H::x_offset(0, inputs.blocks) + inputs.x;
  const int64_t used = rows.tiles * ceil_div(inputs.blocks, H::warps);  // packed blocks of a warp
  const int64_t depth = std::min((budget - rest) / slots_of_warps, used);
  if (budget < rest || depth < std::min<int64_t>(2, used)) return std::nullopt;
  HybridPlan plan{};
  StreamedPlan& launch = plan.launch;
  launch.splits = splits, launch.share = share, launch.per_multiprocessor = per_multiprocessor;
  launch.blocks = static_cast<int>(groups) * splits;
  launch.token_blocks = static_cast<int>(ceil_div(g.tokens, H::tokens));
  launch.depth = static_cast<int>(depth);
  launch.prefetch = static_cast<int>(std::clamp<int64_t>(used - depth, 0, std::clamp(prefetch, 0, kMaxPrefetch)));
  launch.shared_bytes = static_cast<size_t>(H::x_offset(launch.depth, inputs.blocks) + inputs.x);
  plan.sparse_groups = rows.sparse_groups;
  if (splits > 1) {
    const int64_t sums = splits * launch.token_blocks * static_cast<int64_t>(H::Dense::tile_sums);  // of a tile
    plan.dense_partials = by_rows ? sums * sparse_tiles : 0;
    launch.workspace_bytes = static_cast<size_t>(sums * most_groups) * sizeof(uint32_t);
  }
  return Fit{plan, rows.bytes * per_multiprocessor + (splits > 1 ? kBytesWhileAdding : 0)};
}

// Half of the shared memory where that keeps enough in flight, else all of it.
template <class H>
std::optional<Fit> fit(const twofour_gemm& g, const Multiprocessors& gpu, int splits, const StreamedChoices& choices) {
  const int each = std::clamp(choices.per_multiprocessor, 1, kMaxBlocksPerMultiprocessor);
  if (choices.share != 0) return fit<H>(g, gpu, splits, std::clamp(choices.share, 1, 2), each, choices.prefetch);
  const auto half = fit<H>(g, gpu, splits, 2, each, choices.prefetch);
  if (half && half->plan.launch.depth * H::warps * H::Sparse::slot_bytes * each >= kEnoughInFlight) return half;
  return fit<H>(g, gpu, splits, 1, each, choices.prefetch);
}

}  // namespace

std::optional<HybridPlan> hybrid_plan(const twofour_gemm& g, const Multiprocessors& gpu, const StreamedChoices& choices) {
  std::optional<Fit> best;
  dispatch_hybrid<HybridChoice>({g.type, hybrid_keep(g.kernel)}, g.tokens, [&](auto config) {
    using H = decltype(config);
    const Parts parts = hybrid_parts(g);
    const int64_t dense = g.sparse_rows != 0 ? 0 : input_blocks(parts.dense.in_features);
    const int64_t most = std::min<int64_t>(kMaxSplits, input_blocks(parts.sparse.in_features) + dense);
    const int first = static_cast<int>(std::clamp<int64_t>(choices.splits, 1, most));
    for (int splits = first; splits <= most; ++splits) {
      const auto fitting = fit<H>(g, gpu, splits, choices);
      if (!fitting) continue;
      if (!best || fitting->cost < best->cost) best = fitting;
      if (choices.splits != 0) return;
    }
  });
  return best ? std::optional(best->plan) : std::nullopt;
}

HybridProblem hybrid_problem(const twofour_gemm& g, const HybridPlan& plan, const SkinnyProblem& whole) {
  const Parts parts = hybrid_parts(g);
  constexpr int kOutBytes = 2;
  HybridProblem problem{whole, whole, plan.sparse_groups, g.sparse_rows != 0};
  for (const auto& [part, own] : {std::pair(&parts.sparse, &problem.sparse), std::pair(&parts.dense, &problem.dense)}) {
    own->splits = plan.launch.splits, own->depth = plan.launch.depth, own->prefetch = plan.launch.prefetch;
    own->out_features = part->out_features, own->in_features = part->in_features;
    own->weight += part->offset;
    own->x += part->input * element_bytes(g.type);
    own->y = static_cast<uint8_t*>(own->y) + part->row * kOutBytes;
    if (own->channel_scales != nullptr) own->channel_scales += part->row;
    if (own->bias != nullptr) own->bias = static_cast<const uint8_t*>(own->bias) + part->row * kOutBytes;
  }
  problem.dense.partials += plan.dense_partials;
  return problem;
}

void hybrid_simulate(Form sparse, const HybridProblem& problem, const StreamedPlan& plan) {
  dispatch_hybrid<HybridChoice>(sparse, problem.sparse.tokens, [&](auto config) {
    using H = decltype(config);
    const auto x_of = [&](const SkinnyProblem& p) {
      return gpu::Range{p.x, p.x + x_extent(p) * static_cast<size_t>(element_bytes(sparse.type))};
    };
    const auto weight_of = [](const SkinnyProblem& p, Form form) {
      return gpu::Range{p.weight, p.weight + packed_bytes(form, p.out_features, p.in_features)};
    };
    gpu::Block block{};
    block.grid_x = plan.blocks, block.threads = H::threads, block.early = true;
    block.x_range = {x_of(problem.sparse).begin, std::max(x_of(problem.sparse).end, x_of(problem.dense).end)};
    block.readable = {x_of(problem.sparse), x_of(problem.dense), weight_of(problem.sparse, sparse),
                      weight_of(problem.dense, {sparse.type, kKeepAll})};
    simulate_streamed(plan, block, [&](uint8_t* shared) { hybrid_block<H>(problem, shared); });
  });
}

}  // namespace twofour
