// Launches the streamed skinny kernel: partitions a product for a GPU; one entry for the GPU, one for the simulation.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "layout.h"

namespace twofour {

struct SkinnyProblem;

constexpr int kStreamedSm = 90;  // the first with bulk copies and programmatic dependent launch
constexpr int kMaxBlocksPerMultiprocessor = 8;
constexpr int kMaxPrefetch = 64;
constexpr int64_t kEnoughInFlight = 48 * 1024;    // bytes on the way to a multiprocessor at full bandwidth
constexpr int64_t kBytesWhileAdding = 24 * 1024;  // that a multiprocessor reads in the microsecond that adding splits takes

// The limits of a launch.
struct Multiprocessors {
  int count = 1;
  size_t shared_bytes = 228 * 1024;        // per multiprocessor
  size_t block_shared_bytes = 227 * 1024;  // limit of one thread block
};

// The parameters that a search sets. 0: the default.
struct StreamedChoices {
  int splits = 0;     // of the inputs
  int share = 0;      // 1: a thread block may take all the shared memory; 2: half, so that the next kernel's block also fits
  int per_multiprocessor = 0;  // thread blocks of this kernel on each
  int prefetch = 0;            // packed blocks that a warp prefetches into the L2 beyond its ring
};

struct StreamedPlan {
  int splits, per_multiprocessor, share;
  int blocks, token_blocks;  // the grid
  int depth, prefetch;       // slots in a warp's ring; packed blocks beyond it
  size_t shared_bytes, workspace_bytes;
};

// Bytes of shared memory that each of `per_multiprocessor` thread blocks may take.
int64_t streamed_budget(const Multiprocessors& gpu, int share, int per_multiprocessor);

// The plan with the fewest splits from choices.splits on that fits; none where x is too large for the shared memory.
std::optional<StreamedPlan> streamed_plan(Form form, int64_t tokens, int64_t out_features, int64_t in_features,
                                          const Multiprocessors& gpu, const StreamedChoices& choices);

void streamed_configure(const Multiprocessors& gpu);  // once a device: raises the limit of shared memory
void streamed_launch(Form form, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t stream);
void streamed_simulate(Form form, const SkinnyProblem& problem, const StreamedPlan& plan);

// Of one pattern: compiled in streamed.cu for 2:4 and in streamed_4of8.cu to streamed_6of8.cu for the others, in parallel.
template <int kKeep>
void streamed_configure_pattern(const Multiprocessors& gpu);
template <int kKeep>
void streamed_launch_pattern(int type, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t stream);

}  // namespace twofour
