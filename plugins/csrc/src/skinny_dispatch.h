// From run-time type and tokens to the compiled configuration: 4 types x 4 patterns x 8, 16 or 32 tokens a block.
#pragma once

#include <type_traits>

#include "skinny.h"
#include "status.h"

namespace twofour {

// f(integral_constant of the type).
template <class F>
void dispatch_type(int type, F&& f) {
  switch (type) {
    case TWOFOUR_FP16: return f(std::integral_constant<int, TWOFOUR_FP16>{});
    case TWOFOUR_BF16: return f(std::integral_constant<int, TWOFOUR_BF16>{});
    case TWOFOUR_INT8: return f(std::integral_constant<int, TWOFOUR_INT8>{});
    case TWOFOUR_FP8: return f(std::integral_constant<int, TWOFOUR_FP8>{});
    default: fail(TWOFOUR_INVALID_ARGUMENT, "type %d is not one of fp16, bf16, int8, fp8", type);
  }
}

// f(integral_constant of the values that a group keeps).
template <class F>
void dispatch_keep(int keep, F&& f) {
  switch (keep) {
    case kKeep2of4: return f(std::integral_constant<int, kKeep2of4>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default: fail(TWOFOUR_INVALID_ARGUMENT, "no skinny kernel keeps %d values of a group", keep);
  }
}

// f(Choice<type, tiles of 8 tokens, kKeep>{}).
template <template <int, int, int> class Choice, int kKeep, class F>
void dispatch_tokens(int type, int64_t tokens, F&& f) {
  dispatch_type(type, [&](auto constant) {
    constexpr int kType = decltype(constant)::value;
    if (tokens <= 8) f(Choice<kType, 1, kKeep>{});
    else if (tokens <= 16) f(Choice<kType, 2, kKeep>{});
    else f(Choice<kType, 4, kKeep>{});
  });
}

template <template <int, int, int> class Choice, class F>
void dispatch(Form form, int64_t tokens, F&& f) {
  dispatch_keep(form.keep, [&](auto keep) { dispatch_tokens<Choice, decltype(keep)::value>(form.type, tokens, f); });
}

}  // namespace twofour
