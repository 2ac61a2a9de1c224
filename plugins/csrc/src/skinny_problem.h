// The arguments of one launch of the skinny kernel.
#pragma once

#include <stdint.h>

namespace twofour {

struct SkinnyProblem {
  const uint8_t* x;  // [tokens, K]
  const uint8_t* weight;
  void* y;  // [tokens, N]
  const float* channel_scales;
  const void* bias;
  float scale;
  int out_type;
  int tokens;
  int splits;
  int64_t out_features, in_features;
  uint32_t* partials;   // skinny_workspace_bytes(); unused where splits is 1
  unsigned* counters;  // one a tile, all 0 between launches
};

}  // namespace twofour
