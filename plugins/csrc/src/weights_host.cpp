#include "weights.h"

namespace twofour {

int64_t first_violation_host(Form form, const Extent& extent, const void* weight) {
  for (int64_t i = 0; i < extent.n * (extent.k / group_inputs(form.keep)); ++i)
    if (violates(form, extent, weight, i)) return i;
  return -1;
}

void pack_host(Form form, const Extent& extent, const void* weight, uint8_t* packed) {
  for (int64_t i = 0; i < packed_words(extent); ++i) pack_word(form, extent, weight, packed, i);
}

void unpack_host(Form form, const Extent& extent, const uint8_t* packed, void* weight) {
  for (int64_t i = 0; i < packed_words(extent); ++i) unpack_word(form, extent, packed, weight, i);
}

}  // namespace twofour
