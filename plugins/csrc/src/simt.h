// Namespace gpu for the host compiler: one thread block at a time, each CUDA thread a fiber, so that the skinny kernel's
// own source runs on a CPU. It reports errors that a GPU ignores: shared memory starts with arbitrary values; an asynchronous copy
// overwrites its target with arbitrary values until the wait that completes it; copies must be aligned and inside their tensor;
// metadata must be one of the six codes that mma.sp::ordered_metadata defines; a barrier that not all threads reach is
// reported; a kernel that starts before the one before it has ended must wait before it reads x or writes. The semantics
// of mma.sp and ldmatrix are written from the PTX ISA and share nothing with layout.h.
#pragma once

#include "simt_block.h"
#include "simt_copies.h"
#include "simt_mma.h"

namespace twofour {
namespace gpu {

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float load_float(int type, const void* values, int64_t index) {
  const unsigned bits = static_cast<const uint16_t*>(values)[index];
  return type == TWOFOUR_FP16 ? half_bits(bits) : bfloat_bits(bits);
}
inline void store_float(int type, void* values, int64_t index, float value) {
  require_write();
  if (type == TWOFOUR_FP16) static_cast<__half*>(values)[index] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(values)[index] = __float2bfloat16_rn(value);
}
template <class T>
inline void store_partial(uint32_t* p, T value) {
  require_write();
  std::memcpy(p, &value, 4);
}
template <class T>
inline T load_partial(const uint32_t* p) {
  T value;
  std::memcpy(&value, p, 4);
  return value;
}

}  // namespace gpu
}  // namespace twofour
