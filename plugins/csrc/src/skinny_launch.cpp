// From a weight's form to the compiled kernels of its pattern.
#include "hybrid_dispatch.h"
#include "hybrid.h"
#include "hybrid_problem.h"
#include "skinny.h"
#include "skinny_dispatch.h"
#include "streamed.h"

namespace twofour {

void skinny_configure() {
  for (int keep : kPatterns) dispatch_keep(keep, [](auto k) { skinny_configure_pattern<decltype(k)::value>(); });
}

void skinny_launch(Form form, const SkinnyProblem& problem, cudaStream_t stream) {
  dispatch_keep(form.keep, [&](auto k) { skinny_launch_pattern<decltype(k)::value>(form.type, problem, stream); });
}

void streamed_configure(const Multiprocessors& gpu) {
  for (int keep : kPatterns) dispatch_keep(keep, [&](auto k) { streamed_configure_pattern<decltype(k)::value>(gpu); });
}

void streamed_launch(Form form, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t stream) {
  dispatch_keep(form.keep, [&](auto k) { streamed_launch_pattern<decltype(k)::value>(form.type, problem, plan, stream); });
}

void hybrid_configure(const Multiprocessors& gpu) {
  for (int keep : kHybridPatterns)
    dispatch_hybrid_keep(keep, [&](auto k) { hybrid_configure_pattern<decltype(k)::value>(gpu); });
}

void hybrid_launch(Form sparse, const HybridProblem& problem, const StreamedPlan& plan, cudaStream_t stream) {
  dispatch_hybrid_keep(sparse.keep,
                       [&](auto k) { hybrid_launch_pattern<decltype(k)::value>(sparse.type, problem, plan, stream); });
}

}  // namespace twofour
