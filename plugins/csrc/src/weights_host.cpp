#include "weights.h"

namespace twofour {

int64_t first_violation_host(int type, int64_t out_features, int64_t in_features, const void* weight) {
  for (int64_t i = 0; i < out_features * in_features / 4; ++i)
    if (violates(type, weight, i)) return i;
  return -1;
}

void pack_host(int type, int64_t out_features, int64_t in_features, const void* weight, uint8_t* packed) {
  for (int64_t i = 0; i < packed_words(out_features, in_features); ++i)
    pack_word(type, out_features, in_features, weight, packed, i);
}

void unpack_host(int type, int64_t out_features, int64_t in_features, const uint8_t* packed, void* weight) {
  for (int64_t i = 0; i < packed_words(out_features, in_features); ++i)
    unpack_word(type, out_features, in_features, packed, weight, i);
}

}  // namespace twofour
