// The decode step: one new token a sequence through all blocks, with no more than products shared among the threads.
//
// Results are rounded to the activations' type where a model of transformers rounds them, so that both give the same
// tokens: after each product, norm, rotation, activation and sum.

#include <algorithm>

#include "elementwise.h"
#include "product.h"
#include "threads.h"
#include "token_math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_ISA __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EACH_ISA
#endif

namespace twofour_cpu {
namespace {

constexpr int64_t kParallelTokens = 4;  // from which on what is done for each token is shared among the threads

// The functions below are token_math.h for one token of a step, compiled for each instruction set.
struct Buffers {
  void *normed, *q, *k, *v, *attended, *out, *gate, *up, *activated;
  float* scores;  // [tokens * heads, scores_stride]
  int64_t scores_stride;
};

template <class T>
struct Token {
  const twofour_cpu_step& step;
  const twofour_cpu_block& block;
  const Buffers& buffers;
  int64_t token;

  template <class U = T>
  ALWAYS_INLINE U* row(void* matrix, int64_t width) const {
    return static_cast<U*>(matrix) + token * width;
  }
};

template <class T>
ALWAYS_INLINE void norm_token(const Token<T>& t, void* x, bool add, const void* weight) {
  const int64_t hidden = t.step.hidden;
  T* target = t.row(x, hidden);
  const T* more = add ? t.row(t.buffers.out, hidden) : nullptr;
  rms_norm(target, more, static_cast<const T*>(weight), t.step.eps, hidden, t.row(t.buffers.normed, hidden));
}

template <class T>
ALWAYS_INLINE void rotate_heads(const Token<T>& t) {
  const twofour_cpu_step& step = t.step;
  const int64_t dim = step.head_dim, position = step.positions[t.token];
  const T* const cos = static_cast<const T*>(step.cos) + position * dim;
  const T* const sin = static_cast<const T*>(step.sin) + position * dim;
  const auto each = [&](T* head, int64_t heads, const void* norm) {
    for (int64_t i = 0; i < heads; ++i, head += dim) {
      if (norm) rms_norm<T>(head, nullptr, static_cast<const T*>(norm), step.eps, dim, head);
      rotate(head, cos, sin, dim);
    }
  };
  each(t.row(t.buffers.q, step.heads * dim), step.heads, t.block.q_norm);
  each(t.row(t.buffers.k, step.kv_heads * dim), step.kv_heads, t.block.k_norm);
}

template <class T, class C>
ALWAYS_INLINE void rotate_and_keep(const Token<T>& t) {
  rotate_heads(t);
  const twofour_cpu_step& step = t.step;
  const twofour_cpu_block& block = t.block;
  const int64_t dim = step.head_dim, position = step.positions[t.token];
  const T *k = t.row(t.buffers.k, step.kv_heads * dim), *v = t.row(t.buffers.v, step.kv_heads * dim);
  const int64_t page = step.table ? step.table[t.token * step.table_stride + position / step.page_size] : t.token;
  for (int64_t head = 0; head < step.kv_heads; ++head, k += dim, v += dim) {
    const int64_t at = ((page * step.kv_heads + head) * step.page_size + position % step.page_size) * dim;
    keep(k, dim, block.k_multiplier, static_cast<C*>(block.keys) + at);
    keep(v, dim, block.v_multiplier, static_cast<C*>(block.values) + at);
  }
}

template <class T, class C>
ALWAYS_INLINE void attend_head(const Token<T>& t, int64_t head) {
  const twofour_cpu_step& step = t.step;
  const twofour_cpu_block& block = t.block;
  const int64_t dim = step.head_dim, kv_head = head / (step.heads / step.kv_heads), width = step.heads * dim;
  const int64_t length = step.positions[t.token] + 1, page_stride = step.kv_heads * step.page_size * dim;
  const int64_t first = block.window ? std::max<int64_t>(0, length - block.window) : 0;
  const int64_t start = kv_head * step.page_size * dim;
  const Sequence<C> sequence{static_cast<const C*>(block.keys) + start, static_cast<const C*>(block.values) + start,
                             step.table ? step.table + t.token * step.table_stride : nullptr, t.token,
                             step.page_size, page_stride, first, length};
  float* scores = t.buffers.scores + (t.token * step.heads + head) * t.buffers.scores_stride;
  attend(t.row(t.buffers.q, width) + head * dim, sequence, dim, block.attention_scale, block.v_scale, scores,
         t.row(t.buffers.attended, width) + head * dim);
}

template <class T>
ALWAYS_INLINE void activate(const Token<T>& t) {
  const int64_t width = t.step.intermediate;
  silu_times<T>(t.row(t.buffers.gate, width), t.row(t.buffers.up, width), width, t.row(t.buffers.activated, width));
}

#define FOR_TYPE(NAME, T, C)                                                                                        \
  EACH_ISA void norm_##NAME(const Token<T>& t, void* x, bool add, const void* weight) { norm_token(t, x, add, weight); } \
  EACH_ISA void rotate_##NAME(const Token<T>& t) { rotate_heads(t); }                                                \
  EACH_ISA void keep_##NAME(const Token<T>& t) { rotate_and_keep<T, C>(t); }                                         \
  EACH_ISA void attend_##NAME(const Token<T>& t, int64_t head) { attend_head<T, C>(t, head); }                       \
  EACH_ISA void activate_##NAME(const Token<T>& t) { activate(t); }                                                  \
  struct NAME {                                                                                                      \
    using Type = T;                                                                                                  \
    static constexpr auto norm = norm_##NAME;                                                                        \
    static constexpr auto rotate = rotate_##NAME;                                                                    \
    static constexpr auto rotate_and_keep = keep_##NAME;                                                             \
    static constexpr auto attend = attend_##NAME;                                                                    \
    static constexpr auto activate = activate_##NAME;                                                                \
  };
FOR_TYPE(bf16, uint16_t, uint16_t)
FOR_TYPE(bf16_int8, uint16_t, int8_t)
FOR_TYPE(float32, float, float)
FOR_TYPE(float32_int8, float, int8_t)
#undef FOR_TYPE

// A block's parts, for all tokens of a step.
template <class Kind>
struct Parts {
  using T = typename Kind::Type;
  const twofour_cpu_step& step;
  const twofour_cpu_block& block;
  const Buffers& buffers;
  void* x;

  template <class Call>
  void each_token(const Call& call) const {
    const auto body = [&](int64_t token) { call(Token<T>{step, block, buffers, token}); };
    if (step.tokens >= kParallelTokens) return parallel(step.tokens, body);
    for (int64_t token = 0; token < step.tokens; ++token) body(token);
  }
  void norm(bool add, const void* weight) const {
    each_token([&](const Token<T>& t) { Kind::norm(t, x, add, weight); });
  }
  void project() const {
    const twofour_cpu_linear* qkv[] = {block.q, block.k, block.v};
    void* const out[] = {buffers.q, buffers.k, buffers.v};
    apply(qkv, 3, step.tokens, step.type, buffers.normed, out);
  }
  void rotate() const { each_token(Kind::rotate); }
  void rotate_and_keep() const { each_token(Kind::rotate_and_keep); }
  void attend() const {
    parallel(step.tokens * step.heads, [&](int64_t item) {
      Kind::attend(Token<T>{step, block, buffers, item / step.heads}, item % step.heads);
    });
  }
  void after_attention() const {
    apply(&block.o, 1, step.tokens, step.type, buffers.attended, &buffers.out);
    norm(true, block.second_norm);
    const twofour_cpu_linear* gate_up[] = {block.gate, block.up};
    void* const out[] = {buffers.gate, buffers.up};
    apply(gate_up, 2, step.tokens, step.type, buffers.normed, out);
    each_token(Kind::activate);
    apply(&block.down, 1, step.tokens, step.type, buffers.activated, &buffers.out);
  }
};

template <class Kind>
void decode_as(const twofour_cpu_step& step, const twofour_cpu_block* blocks, int count, void* x,
               const Buffers& buffers) {
  for (int i = 0; i < count; ++i) {
    const Parts<Kind> parts{step, blocks[i], buffers, x};
    parts.norm(i > 0, blocks[i].first_norm);
    parts.project();
    parts.rotate_and_keep();
    parts.attend();
    parts.after_attention();
  }
  Parts<Kind>{step, blocks[count - 1], buffers, x}.norm(true, step.final_norm);
  memcpy(x, buffers.normed, step.tokens * step.hidden * sizeof(typename Kind::Type));
}

// Memory for what the parts leave each other; `scores_stride` is 0 where no attention is computed here.
Buffers allocate(const twofour_cpu_step& step, int64_t scores_stride) {
  static thread_local Scratch scratch;
  const int64_t size = step.type == TWOFOUR_CPU_FLOAT32 ? 4 : 2, tokens = step.tokens;
  const int64_t q_width = step.heads * step.head_dim, kv_width = step.kv_heads * step.head_dim;
  const int64_t widths[] = {step.hidden, q_width, kv_width, kv_width, q_width, step.hidden, step.intermediate,
                            step.intermediate, step.intermediate};
  int64_t offsets[9], bytes = 0;
  for (int i = 0; i < 9; ++i) offsets[i] = bytes, bytes += ceil_div(tokens * widths[i] * size, 64) * 64;
  uint8_t* memory = scratch.bytes(bytes + tokens * step.heads * scores_stride * sizeof(float));
  Buffers buffers;
  void** const fields[] = {&buffers.normed, &buffers.q,    &buffers.k,  &buffers.v,        &buffers.attended,
                           &buffers.out,    &buffers.gate, &buffers.up, &buffers.activated};
  for (int i = 0; i < 9; ++i) *fields[i] = memory + offsets[i];
  buffers.scores = reinterpret_cast<float*>(memory + bytes), buffers.scores_stride = scores_stride;
  return buffers;
}

}  // namespace

void decode(const twofour_cpu_step& step, const twofour_cpu_block* blocks, int count, void* x) {
  const int64_t longest = 1 + *std::max_element(step.positions, step.positions + step.tokens);
  const Buffers buffers = allocate(step, ceil_div(longest, kLanes) * kLanes);
  if (step.type == TWOFOUR_CPU_BFLOAT16)
    step.cache_int8 ? decode_as<bf16_int8>(step, blocks, count, x, buffers)
                    : decode_as<bf16>(step, blocks, count, x, buffers);
  else
    step.cache_int8 ? decode_as<float32_int8>(step, blocks, count, x, buffers)
                    : decode_as<float32>(step, blocks, count, x, buffers);
}

void before_attention(const twofour_cpu_step& step, const twofour_cpu_block& block, void* x, void* add, void* q, void* k,
                      void* v) {
  Buffers buffers = allocate(step, 0);
  buffers.out = add, buffers.q = q, buffers.k = k, buffers.v = v;
  const auto run = [&](const auto& parts) {
    parts.norm(add != nullptr, block.first_norm);
    parts.project();
    parts.rotate();
  };
  step.type == TWOFOUR_CPU_BFLOAT16 ? run(Parts<bf16>{step, block, buffers, x})
                                    : run(Parts<float32>{step, block, buffers, x});
}

void after_attention(const twofour_cpu_step& step, const twofour_cpu_block& block, void* x, void* attended, void* out) {
  Buffers buffers = allocate(step, 0);
  buffers.attended = attended, buffers.out = out;
  step.type == TWOFOUR_CPU_BFLOAT16 ? Parts<bf16>{step, block, buffers, x}.after_attention()
                                    : Parts<float32>{step, block, buffers, x}.after_attention();
}

void final_norm(const twofour_cpu_step& step, void* x, void* add, void* out) {
  Buffers buffers{};
  buffers.out = add, buffers.normed = out;
  const twofour_cpu_block none{};
  step.type == TWOFOUR_CPU_BFLOAT16 ? Parts<bf16>{step, none, buffers, x}.norm(true, step.final_norm)
                                    : Parts<float32>{step, none, buffers, x}.norm(true, step.final_norm);
}

}  // namespace twofour_cpu
