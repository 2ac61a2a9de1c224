// From run-time type and tokens to the compiled configuration: 4 types x 8, 16 or 32 tokens a block.
#pragma once

#include "skinny.cuh"
#include "skinny.h"
#include "status.h"

namespace twofour {

template <int kType, class F>
void dispatch_tokens(int64_t tokens, F&& f) {
  if (tokens <= 8) f(typename SkinnyChoice<kType, 1>::Config{});
  else if (tokens <= 16) f(typename SkinnyChoice<kType, 2>::Config{});
  else f(typename SkinnyChoice<kType, 4>::Config{});
}

template <class F>
void dispatch_skinny(int type, int64_t tokens, F&& f) {
  switch (type) {
    case TWOFOUR_FP16: return dispatch_tokens<TWOFOUR_FP16>(tokens, f);
    case TWOFOUR_BF16: return dispatch_tokens<TWOFOUR_BF16>(tokens, f);
    case TWOFOUR_INT8: return dispatch_tokens<TWOFOUR_INT8>(tokens, f);
    case TWOFOUR_FP8: return dispatch_tokens<TWOFOUR_FP8>(tokens, f);
    default: fail(TWOFOUR_INVALID_ARGUMENT, "type %d is not one of fp16, bf16, int8, fp8", type);
  }
}

}  // namespace twofour
