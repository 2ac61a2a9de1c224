// Launches the hybrid kernel: partitions a product for a GPU; one entry for the GPU, one for the simulation.
#pragma once

#include "hybrid_parts.h"
#include "streamed.h"

namespace twofour {

struct HybridProblem;

struct HybridPlan {
  StreamedPlan launch;
  int sparse_groups;       // of rows: groups of `splits` thread blocks for the sparse ones
  int64_t dense_partials;  // of rows: where the partial sums of the dense ones begin
};

// The plan with the fewest splits from choices.splits on that fits; none where x is too large for the shared memory.
std::optional<HybridPlan> hybrid_plan(const twofour_gemm& gemm, const Multiprocessors& gpu, const StreamedChoices& choices);

// The problem of a plan, whose pointers are those of the whole product.
HybridProblem hybrid_problem(const twofour_gemm& gemm, const HybridPlan& plan, const SkinnyProblem& whole);

void hybrid_configure(const Multiprocessors& gpu);  // once a device: raises the limit of shared memory
void hybrid_launch(Form sparse, const HybridProblem& problem, const StreamedPlan& plan, cudaStream_t stream);
void hybrid_simulate(Form sparse, const HybridProblem& problem, const StreamedPlan& plan);

// Of one pattern: compiled in hybrid.cu for 2:4 and in hybrid_4of8.cu.
template <int kKeep>
void hybrid_configure_pattern(const Multiprocessors& gpu);
template <int kKeep>
void hybrid_launch_pattern(int type, const HybridProblem& problem, const StreamedPlan& plan, cudaStream_t stream);

}  // namespace twofour
