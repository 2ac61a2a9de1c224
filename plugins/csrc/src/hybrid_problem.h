// The arguments of one launch of the hybrid kernel (hybrid.cuh).
#pragma once

#include "skinny_problem.h"

namespace twofour {

// Both parts as products of their own, with the same splits, depth and prefetch: of rows, the dense part's y, scales, bias
// and partial sums begin where its rows do; of inputs, its x begins at its inputs and the others are the sparse part's.
struct HybridProblem {
  SkinnyProblem sparse, dense;
  int sparse_groups;  // of rows: groups of `splits` thread blocks that have sparse rows, before those that have dense ones
  bool by_rows;       // which the parts divide, or else the inputs
};

}  // namespace twofour
