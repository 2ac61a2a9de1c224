// The streamed kernel simulated on the CPU, and the partition of a product, which GPU and simulation share.
#include "simt.h"
#include "streamed.cuh"

#include <algorithm>

#include "skinny_dispatch.h"
#include "streamed.h"
#include "streamed_simulate.h"

namespace twofour {

namespace {

// The plan with these splits and this share of the shared memory; none where not even two slots a warp fit.
template <class C>
std::optional<StreamedPlan> fit(int64_t tokens, int64_t out_features, int64_t in_features, const Multiprocessors& gpu,
                                int splits, int share, int per_multiprocessor, int prefetch) {
  const int64_t inputs = ceil_div(input_blocks(in_features), splits);
  const int64_t x = C::x_rows(static_cast<int>(std::min<int64_t>(tokens, C::tokens))) * C::x_pitch(inputs);
  const int64_t budget = streamed_budget(gpu, share, per_multiprocessor);
  const int64_t slots_of_warps = C::x_offset(1, inputs) - C::x_offset(0, inputs), rest = C::x_offset(0, inputs) + x;
  const int64_t used = row_tiles(out_features) * ceil_div(inputs, C::warps);  // a warp has no more packed blocks than that
  const int64_t depth = std::min((budget - rest) / slots_of_warps, used);
  if (budget < rest || depth < std::min<int64_t>(2, used)) return std::nullopt;
  StreamedPlan plan{};
  plan.splits = splits, plan.share = share, plan.per_multiprocessor = per_multiprocessor;
  const int64_t groups = std::clamp<int64_t>(gpu.count * per_multiprocessor / splits, 1, row_tiles(out_features));
  plan.blocks = static_cast<int>(groups) * splits;
  plan.token_blocks = static_cast<int>(ceil_div(tokens, C::tokens));
  plan.depth = static_cast<int>(depth);
  plan.prefetch = static_cast<int>(std::clamp<int64_t>(used - depth, 0, std::clamp(prefetch, 0, kMaxPrefetch)));
  plan.shared_bytes = static_cast<size_t>(C::x_offset(plan.depth, inputs) + x);
  if (splits > 1)
    plan.workspace_bytes = static_cast<size_t>(splits * plan.token_blocks * row_tiles(out_features) * C::tile_sums) * sizeof(uint32_t);
  return plan;
}

// Half of the shared memory where that keeps enough in flight, else all of it.
template <class C>
std::optional<StreamedPlan> fit(int64_t tokens, int64_t out_features, int64_t in_features, const Multiprocessors& gpu,
                                int splits, const StreamedChoices& choices) {
  const int per_multiprocessor = std::clamp(choices.per_multiprocessor, 1, kMaxBlocksPerMultiprocessor);
  if (choices.share != 0)
    return fit<C>(tokens, out_features, in_features, gpu, splits, std::clamp(choices.share, 1, 2), per_multiprocessor, choices.prefetch);
  const auto half = fit<C>(tokens, out_features, in_features, gpu, splits, 2, per_multiprocessor, choices.prefetch);
  if (half && half->depth * C::warps * C::slot_bytes * per_multiprocessor >= kEnoughInFlight) return half;
  return fit<C>(tokens, out_features, in_features, gpu, splits, 1, per_multiprocessor, choices.prefetch);
}

// Bytes read while the busiest thread block runs.
template <class C>
int64_t cost(const StreamedPlan& plan, int64_t out_features, int64_t in_features) {
  const int64_t tiles = ceil_div(row_tiles(out_features), plan.blocks / plan.splits);
  const int64_t bytes = tiles * ceil_div(input_blocks(in_features), plan.splits) * C::slot_bytes;
  return bytes * plan.per_multiprocessor + (plan.splits > 1 ? kBytesWhileAdding : 0);
}

}  // namespace

int64_t streamed_budget(const Multiprocessors& gpu, int share, int per_multiprocessor) {
  constexpr size_t kReserved = 1024;  // of each thread block, by the driver
  const size_t each = gpu.shared_bytes / static_cast<size_t>(share * per_multiprocessor) - kReserved;
  return static_cast<int64_t>(std::min(gpu.block_shared_bytes, each));
}

std::optional<StreamedPlan> streamed_plan(Form form, int64_t tokens, int64_t out_features, int64_t in_features,
                                          const Multiprocessors& gpu, const StreamedChoices& choices) {
  std::optional<StreamedPlan> best;
  dispatch<StreamedChoice>(form, tokens, [&](auto config) {
    using C = decltype(config);
    const int64_t most = std::min<int64_t>(kMaxSplits, input_blocks(in_features));
    const int first = static_cast<int>(std::clamp<int64_t>(choices.splits, 1, most));
    for (int splits = first; splits <= most; ++splits) {
      const auto plan = fit<C>(tokens, out_features, in_features, gpu, splits, choices);
      if (!plan) continue;
      if (!best || cost<C>(*plan, out_features, in_features) < cost<C>(*best, out_features, in_features)) best = plan;
      if (choices.splits != 0) return;
    }
  });
  return best;
}

void streamed_simulate(Form form, const SkinnyProblem& problem, const StreamedPlan& plan) {
  dispatch<StreamedChoice>(form, problem.tokens, [&](auto config) {
    using C = decltype(config);
    const size_t x_bytes = x_extent(problem) * element_bytes(form.type);
    const size_t weight_bytes = packed_bytes(form, problem.out_features, problem.in_features);
    gpu::Block block{};
    block.grid_x = plan.blocks, block.threads = C::threads, block.early = true;
    block.x_range = {problem.x, problem.x + x_bytes};
    block.readable = {block.x_range, {problem.weight, problem.weight + weight_bytes}};
    simulate_streamed(plan, block, [&](uint8_t* shared) { streamed_block<C>(problem, shared); });
  });
}

}  // namespace twofour
