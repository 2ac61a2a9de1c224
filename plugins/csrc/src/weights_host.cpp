#include "weights.h"

namespace twofour {

int64_t first_violation_host(Form form, int64_t out_features, int64_t in_features, const void* weight) {
  for (int64_t i = 0; i < out_features * in_features / group_inputs(form.keep); ++i)
    if (violates(form, weight, i)) return i;
  return -1;
}

void pack_host(Form form, int64_t out_features, int64_t in_features, const void* weight, uint8_t* packed) {
  for (int64_t i = 0; i < packed_words(out_features, in_features); ++i)
    pack_word(form, out_features, in_features, weight, packed, i);
}

void unpack_host(Form form, int64_t out_features, int64_t in_features, const uint8_t* packed, void* weight) {
  for (int64_t i = 0; i < packed_words(out_features, in_features); ++i)
    unpack_word(form, out_features, in_features, packed, weight, i);
}

}  // namespace twofour
