// A thread's registers of a tile: the same for nvcc (ptx.cuh) and for the simulated GPU (simt.h).
#pragma once

#include <stdint.h>

#include "twofour.h"

namespace twofour {
namespace gpu {

struct Fragment {
  uint32_t r[4];
};
struct Pair {
  uint32_t r[2];
};
template <int kType>
struct Accumulator {
  using Type = float;
};
template <>
struct Accumulator<TWOFOUR_INT8> {
  using Type = int;
};

}  // namespace gpu
}  // namespace twofour
