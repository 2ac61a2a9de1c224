// The two parts of a hybrid weight: first rows or inputs in a pattern, the others dense, packed one after the other.
#pragma once

#include "layout.h"

namespace twofour {

// What the sparse part of a hybrid kernel's weight keeps; 0: another kernel.
TWOFOUR_HD constexpr int hybrid_keep(int kernel) {
  return kernel == TWOFOUR_HYBRID ? kKeep2of4 : kernel == TWOFOUR_HYBRID_4OF8 ? 4 : 0;
}
inline bool is_hybrid(const twofour_gemm& g) { return hybrid_keep(g.kernel) != 0; }
constexpr int kHybridPatterns[] = {kKeep2of4, 4};

struct Part {
  Form form;
  int64_t row, input;                  // its first
  int64_t out_features, in_features;
  size_t offset;                       // of its first packed block
  size_t bytes() const { return packed_bytes(form, out_features, in_features); }
  Extent extent(int64_t pitch) const { return {out_features, in_features, pitch}; }
};
struct Parts {
  Part sparse, dense;
  size_t bytes() const { return sparse.bytes() + dense.bytes(); }
};

inline Parts hybrid_parts(const twofour_gemm& g) {
  const bool by_rows = g.sparse_rows != 0;
  Parts parts{{{g.type, hybrid_keep(g.kernel)}, 0, 0, by_rows ? g.sparse_rows : g.out_features,
               by_rows ? g.in_features : g.sparse_inputs, 0},
              {{g.type, kKeepAll}, g.sparse_rows, g.sparse_inputs, g.out_features - g.sparse_rows,
               g.in_features - g.sparse_inputs, 0}};
  parts.dense.offset = parts.sparse.bytes();
  return parts;
}

}  // namespace twofour
