// Products of whole layers: inputs quantized, rows shared among the threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"
#include "scratch.h"

namespace twofour_cpu {

int isa_in_use();
bool has_bf16();
bool use_isa(int isa);  // false where this processor lacks it
Kernel kernel_for(int form);  // of the instruction set in use

// Inputs as the kernels read them, for `tokens` rows x of `type`; and each token's scale where it has one of its own.
struct Quantized {
  const uint8_t* q;
  int64_t stride;  // bytes
  const float* token_scales;
};
// y[i] = linears[i](x) for inputs x [tokens, in_features] of `type`, y of the same type. Layers that do the same to their
// input quantize it once.
void apply(const twofour_cpu_linear* const* linears, int count, int64_t tokens, int type, const void* x, void* const* y);
// y = linear of inputs that are quantized already.
void apply_quantized(const twofour_cpu_linear& linear, int64_t tokens, const Quantized& x, int type, void* y);

void attend_prompts(const twofour_cpu_attention& attention);  // attention.cpp

// The decode step and its parts (decoder.cpp).
void decode(const twofour_cpu_step& step, const twofour_cpu_block* blocks, int count, void* x);
void before_attention(const twofour_cpu_step& step, const twofour_cpu_block& block, void* x, void* add, void* q, void* k,
                      void* v);
void after_attention(const twofour_cpu_step& step, const twofour_cpu_block& block, void* x, void* attended, void* out);
void final_norm(const twofour_cpu_step& step, void* x, void* add, void* out);

}  // namespace twofour_cpu
