// From a hybrid problem's pattern, type and tokens to the compiled configuration.
#pragma once

#include "hybrid_parts.h"
#include "skinny_dispatch.h"

namespace twofour {

// f(integral_constant of the values that a group of the sparse part keeps).
template <class F>
void dispatch_hybrid_keep(int keep, F&& f) {
  switch (keep) {
    case kKeep2of4: return f(std::integral_constant<int, kKeep2of4>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: fail(TWOFOUR_INVALID_ARGUMENT, "no hybrid kernel keeps %d values of a group", keep);
  }
}

template <template <int, int, int> class Choice, class F>
void dispatch_hybrid(Form sparse, int64_t tokens, F&& f) {
  dispatch_hybrid_keep(sparse.keep, [&](auto keep) { dispatch_tokens<Choice, decltype(keep)::value>(sparse.type, tokens, f); });
}

}  // namespace twofour
