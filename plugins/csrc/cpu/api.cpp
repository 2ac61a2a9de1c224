// The C interface: checks arguments, keeps the message of the last error.
#include <stdio.h>

#include <algorithm>
#include <atomic>

#include "elementwise.h"
#include "product.h"
#include "threads.h"

namespace {

using namespace twofour_cpu;

thread_local char last_error[256] = "";

template <class... Arguments>
int fail(int status, const char* format, Arguments... arguments) {
  snprintf(last_error, sizeof(last_error), format, arguments...);
  return status;
}

void copy_row(const twofour_cpu_linear& linear, int64_t row, uint16_t* y) {
  const int form = linear.form;
  const uint8_t* tile = static_cast<const uint8_t*>(linear.weight) + row / kTileRows * tile_bytes(form, linear.in_features);
  const uint8_t* first = tile + row % kTileRows / kHalfRows * half_bytes(form) + row % kHalfRows * 4;
  for (int64_t input = 0; input < linear.in_features; ++input) {
    const uint8_t* block = first + input / kBlockInputs * 2 * half_bytes(form);
    y[input] = reinterpret_cast<const uint16_t*>(block + input % kBlockInputs / 2 * 64)[input % 2];
  }
}

int check_sizes(int form, int64_t rows, int64_t inputs) {
  if (form < TWOFOUR_CPU_INT8 || form > TWOFOUR_CPU_BF16_6OF8)
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "form %d is none of 0 to 9", form);
  if (rows >= 1 && inputs >= 1 && inputs % group_inputs(form) == 0) return TWOFOUR_CPU_OK;
  if (is_dense(form))
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "no weight [%lld, %lld]", static_cast<long long>(rows),
                static_cast<long long>(inputs));
  return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "no weight [%lld, %lld]: a %d:%d weight has groups of %d inputs",
              static_cast<long long>(rows), static_cast<long long>(inputs), kept_of_group(form), group_inputs(form),
              group_inputs(form));
}

// Whether the positions of each group of a sparse weight are those of as many elements as it keeps.
int check_positions(int form, int64_t rows, int64_t inputs, const uint8_t* positions) {
  const int64_t bytes_of_row = ceil_div(inputs, 8), groups = inputs / group_inputs(form);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* at = positions + row * bytes_of_row;
      if (is_2of4(form)) {
        const int code = at[group / 2] >> (group % 2 * 4) & 15;
        if ((code & 3) < code >> 2) continue;
        return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "row %lld, group %lld: indices do not ascend",
                    static_cast<long long>(row), static_cast<long long>(group));
      }
      if (const int kept = __builtin_popcount(at[group]); kept != kept_of_group(form))
        return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "row %lld, group %lld: the mask keeps %d of 8, not %d",
                    static_cast<long long>(row), static_cast<long long>(group), kept, kept_of_group(form));
    }
  return TWOFOUR_CPU_OK;
}

int check_rest(const twofour_cpu_linear& linear, int64_t tokens, int type);

int check(const twofour_cpu_linear* linear, int64_t tokens, int type, bool quantizes = true) {
  if (const int status = check_sizes(linear->form, linear->out_features, linear->in_features)) return status;
  if (tokens < 0) return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "%lld tokens", static_cast<long long>(tokens));
  if (reinterpret_cast<uintptr_t>(linear->weight) % 64)
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "the packed weight is not aligned to 64 bytes");
  if (!quantizes) return TWOFOUR_CPU_OK;
  const int rounding = linear->rounding;
  const bool to_int8 = rounding == TWOFOUR_CPU_TO_INT8 || rounding == TWOFOUR_CPU_EACH_TOKEN;
  if (rounding < TWOFOUR_CPU_AS_IS || rounding > TWOFOUR_CPU_TO_FP8 || to_int8 != is_int8(linear->form) ||
      (type != TWOFOUR_CPU_BFLOAT16 && (type != TWOFOUR_CPU_FLOAT32 || rounding == TWOFOUR_CPU_AS_IS)))
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "no inputs of type %d with rounding %d for a weight of form %d", type,
                rounding, linear->form);
  const bool has_multiplier = rounding == TWOFOUR_CPU_TO_INT8 || rounding == TWOFOUR_CPU_TO_FP8 || linear->multiplier;
  if (has_multiplier && (!linear->multiplier || (linear->multipliers != 1 && linear->multipliers != linear->in_features)))
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "%lld multipliers for %lld inputs",
                static_cast<long long>(linear->multipliers), static_cast<long long>(linear->in_features));
  return linear->rest ? check_rest(*linear, tokens, type) : TWOFOUR_CPU_OK;
}

int check_rest(const twofour_cpu_linear& linear, int64_t tokens, int type) {
  const twofour_cpu_linear& rest = *linear.rest;
  const bool fits = linear.axis == TWOFOUR_CPU_ROWS     ? rest.in_features == linear.in_features
                    : linear.axis == TWOFOUR_CPU_INPUTS ? rest.out_features == linear.out_features
                                                        : false;
  if (!fits || rest.rest)
    return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "the two parts of a layer do not fit along axis %d", linear.axis);
  return check(&rest, tokens, type);
}

int check_step(const twofour_cpu_step& step, const twofour_cpu_block* blocks, int count) {
  if (step.hidden % 16 || step.intermediate % 16 || step.head_dim % 32 || step.head_dim > 256 ||
      step.heads % step.kv_heads)
    return fail(TWOFOUR_CPU_UNSUPPORTED, "no decoder for hidden size %lld, intermediate size %lld, head size %lld",
                static_cast<long long>(step.hidden), static_cast<long long>(step.intermediate),
                static_cast<long long>(step.head_dim));
  for (int i = 0; i < count; ++i)
    for (const twofour_cpu_linear* linear : {blocks[i].q, blocks[i].k, blocks[i].v, blocks[i].o, blocks[i].gate,
                                             blocks[i].up, blocks[i].down})
      if (const int status = check(linear, step.tokens, step.type)) return status;
  return TWOFOUR_CPU_OK;
}

}  // namespace

int twofour_cpu_version(void) { return TWOFOUR_CPU_VERSION; }
const char* twofour_cpu_last_error(void) { return last_error; }
int twofour_cpu_isa_in_use(void) { return isa_in_use(); }
int twofour_cpu_has_bf16(void) { return has_bf16(); }

int twofour_cpu_use_isa(int isa) {
  if (use_isa(isa)) return TWOFOUR_CPU_OK;
  return fail(TWOFOUR_CPU_UNSUPPORTED, "this processor has no instruction set %d", isa);
}

int twofour_cpu_set_threads(int threads) { return set_threads(threads); }

size_t twofour_cpu_weight_bytes(int form, int64_t out_features, int64_t in_features) {
  return check_sizes(form, out_features, in_features) ? 0 : packed_bytes(form, out_features, in_features);
}

int twofour_cpu_pack(int form, int64_t out_features, int64_t in_features, const void* values, const uint8_t* positions,
                     void* packed) {
  if (const int status = check_sizes(form, out_features, in_features)) return status;
  if (!is_dense(form))
    if (const int status = check_positions(form, out_features, in_features, positions)) return status;
  pack(form, out_features, in_features, values, positions, static_cast<uint8_t*>(packed));
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_unpack(int form, int64_t out_features, int64_t in_features, const void* packed, void* weight) {
  if (const int status = check_sizes(form, out_features, in_features)) return status;
  unpack(form, out_features, in_features, static_cast<const uint8_t*>(packed), weight);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_matmul_int8(const twofour_cpu_linear* linear, int64_t tokens, const int8_t* q,
                            const float* token_scales, int out_type, void* y) {
  if (const int status = check(linear, tokens, TWOFOUR_CPU_BFLOAT16, false)) return status;
  if (!is_int8(linear->form)) return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "form %d is not int8", linear->form);
  const int64_t k = linear->in_features, stride = blocks_of(k) * kBlockInputs;
  static thread_local Scratch scratch;
  uint8_t* x = scratch.bytes(tokens * stride);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t i = 0; i < k; ++i) x[token * stride + i] = static_cast<uint8_t>(q[token * k + i] ^ kInt8Offset);
  if (tokens) apply_quantized(*linear, tokens, {x, stride, token_scales}, out_type, y);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_apply_all(const twofour_cpu_linear* const* linears, int count, int64_t tokens, int type, const void* x,
                          void* const* y) {
  for (int i = 0; i < count; ++i)
    if (const int status = check(linears[i], tokens, type)) return status;
  if (tokens) apply(linears, count, tokens, type, x, y);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_apply(const twofour_cpu_linear* linear, int64_t tokens, int type, const void* x, void* y) {
  return twofour_cpu_apply_all(&linear, 1, tokens, type, x, &y);
}

int twofour_cpu_rows(const twofour_cpu_linear* linear, int64_t count, const int64_t* ids, void* y) {
  if (linear->form != TWOFOUR_CPU_BF16)
    return fail(TWOFOUR_CPU_UNSUPPORTED, "rows are read of a dense bf16 weight, and this has form %d", linear->form);
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= linear->out_features)
      return fail(TWOFOUR_CPU_INVALID_ARGUMENT, "row %lld of %lld", static_cast<long long>(ids[i]),
                  static_cast<long long>(linear->out_features));
  for (int64_t i = 0; i < count; ++i)
    copy_row(*linear, ids[i], static_cast<uint16_t*>(y) + i * linear->in_features);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_decode(const twofour_cpu_step* step, const twofour_cpu_block* blocks, int count, void* x) {
  if (const int status = check_step(*step, blocks, count)) return status;
  if (step->tokens) decode(*step, blocks, count, x);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_before_attention(const twofour_cpu_step* step, const twofour_cpu_block* block, void* x, void* add,
                                 void* q, void* k, void* v) {
  if (const int status = check_step(*step, block, 1)) return status;
  if (step->tokens) before_attention(*step, *block, x, add, q, k, v);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_after_attention(const twofour_cpu_step* step, const twofour_cpu_block* block, void* x, void* attended,
                                void* out) {
  if (const int status = check_step(*step, block, 1)) return status;
  if (step->tokens) after_attention(*step, *block, x, attended, out);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_final_norm(const twofour_cpu_step* step, void* x, void* add, void* out) {
  if (const int status = check_step(*step, nullptr, 0)) return status;
  if (step->tokens) final_norm(*step, x, add, out);
  return TWOFOUR_CPU_OK;
}

int twofour_cpu_attend_prompts(const twofour_cpu_attention* attention) {
  const twofour_cpu_attention& a = *attention;
  if (a.head_dim % 32 || a.head_dim < 32 || a.kv_heads < 1 || a.heads % a.kv_heads || a.queries < 0 ||
      a.keys < a.queries || a.window < 0)
    return fail(TWOFOUR_CPU_UNSUPPORTED, "no attention of %lld queries over %lld keys with heads of size %lld",
                static_cast<long long>(a.queries), static_cast<long long>(a.keys), static_cast<long long>(a.head_dim));
  if (a.sequences && a.queries) attend_prompts(a);
  return TWOFOUR_CPU_OK;
}

uint64_t twofour_cpu_read(const void* memory, size_t bytes) {
  constexpr size_t kChunk = 1 << 18;
  std::atomic<uint64_t> sum{0};
  parallel(static_cast<int64_t>((bytes + kChunk - 1) / kChunk), [&](int64_t chunk) {
    const size_t begin = static_cast<size_t>(chunk) * kChunk;
    sum += sum_words(static_cast<const uint8_t*>(memory) + begin, std::min(kChunk, bytes - begin) / 8);
  });
  return sum;
}
