// The context's choice of a partition for the hybrid kernel.
#include <set>

#include "context.h"

using namespace twofour;

HybridPlan twofour_context::hybrid(const twofour_gemm& g) const {
  const auto chosen = algorithms_.find(bucket_key(g));
  const StreamedChoices choices = chosen == algorithms_.end() ? StreamedChoices{} : choices_of(chosen->second);
  if (const auto plan = hybrid_plan(g, multiprocessors_, choices)) return *plan;
  if (const auto plan = hybrid_plan(g, multiprocessors_, {})) return *plan;  // chosen for fewer tokens of the bucket
  fail(TWOFOUR_UNSUPPORTED, "%s: x of %lld inputs does not fit the shared memory; multiply the parts by kernels of their own",
       kernel_name(g.kernel), static_cast<long long>(g.in_features));
}

std::vector<twofour_algorithm> twofour_context::hybrid_algorithms(const twofour_gemm& g) const {
  std::vector<twofour_algorithm> all;
  std::set<std::tuple<int, int, int>> launches;
  for (int splits : {1, 2, 3, 4})
    for (const auto& [share, blocks] : {std::pair(1, 1), std::pair(2, 1), std::pair(1, 2)}) {
      const auto plan = hybrid_plan(g, multiprocessors_, {splits, share, blocks, 0});
      if (!plan) continue;
      const StreamedPlan& launch = plan->launch;
      if (launches.insert({launch.splits, launch.blocks, launch.depth}).second) all.push_back(words_of(launch));
    }
  return all;
}
