// The arguments of one launch of the skinny kernel, staged (skinny.cuh) or streamed (streamed.cuh).
#pragma once

#include <stdint.h>

namespace twofour {

struct SkinnyProblem {
  const uint8_t* x;  // [tokens, K], rows x_pitch elements apart
  const uint8_t* weight;
  void* y;  // [tokens, N], rows y_pitch elements apart
  const float* channel_scales;
  const void* bias;
  float scale;
  int out_type;
  int tokens;
  int splits;
  int depth, prefetch;  // of the streamed kernel: slots in a warp's ring; packed blocks beyond it to prefetch into the L2
  int64_t out_features, in_features, x_pitch, y_pitch;
  uint32_t* partials;   // the workspace; unused where splits is 1
  unsigned* counters;  // one a tile or range of rows, all 0 between launches
};

// Elements from x's first to its last.
inline size_t x_extent(const SkinnyProblem& p) { return static_cast<size_t>((p.tokens - 1) * p.x_pitch + p.in_features); }

}  // namespace twofour
