// Launches the skinny kernel: its geometry; one entry for the GPU, one for the simulation.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.h"

namespace twofour {

struct SkinnyProblem;

constexpr int kMaxSkinnyTokens = 64;
constexpr int kMaxSplits = 32;
constexpr int kSkinnyCounters = 1 << 14;  // tiles that may be split; more tiles need no splitting

struct SkinnyGeometry {
  int token_blocks;    // grid x
  int64_t row_blocks;  // grid y
  int max_splits;
  size_t split_bytes;  // of partial sums, for each split
};

SkinnyGeometry skinny_geometry(Form form, int64_t tokens, int64_t out_features, int64_t in_features);

// The fewest splits with enough blocks to keep every multiprocessor loading.
int default_splits(const SkinnyGeometry& geometry, int multiprocessors);
size_t skinny_workspace_bytes(const SkinnyGeometry& geometry, int splits);

void skinny_configure();  // once a device: raises the limit of shared memory
void skinny_launch(Form form, const SkinnyProblem& problem, cudaStream_t stream);
void skinny_simulate(Form form, const SkinnyProblem& problem);

// Of one pattern: compiled in skinny.cu for 2:4 and in skinny_of8.cu for the others.
template <int kKeep>
void skinny_configure_pattern();
template <int kKeep>
void skinny_launch_pattern(int type, const SkinnyProblem& problem, cudaStream_t stream);

}  // namespace twofour
