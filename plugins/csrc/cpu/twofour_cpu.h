/* libtwofour_cpu: products with dense, 2:4 and n:8 weights on a CPU, and the decode step of a decoder built on them.
 *
 * y[tokens, out_features] = x[tokens, in_features] w^T, scaled and with a bias, for a weight packed by
 * twofour_cpu_pack. int8 sums are exact. All matrices are row-major; pointers are host pointers; weights must be
 * aligned to 64 bytes. The instruction set is chosen when the library is loaded.
 *
 * A function returns 0 or a status of twofour_cpu_status; twofour_cpu_last_error() then says in one line what is wrong
 * (per thread). Any thread may call; one call at a time has the worker threads, others run on their own thread.
 */
#ifndef TWOFOUR_CPU_H_
#define TWOFOUR_CPU_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TWOFOUR_CPU_API __attribute__((visibility("default")))
#define TWOFOUR_CPU_VERSION 2

typedef enum twofour_cpu_status {
  TWOFOUR_CPU_OK = 0,
  TWOFOUR_CPU_INVALID_ARGUMENT = 1,
  TWOFOUR_CPU_UNSUPPORTED = 2, /* this processor lacks the instructions that were asked for */
} twofour_cpu_status;

typedef enum twofour_cpu_isa { TWOFOUR_CPU_PORTABLE = 0, TWOFOUR_CPU_AVX2 = 1, TWOFOUR_CPU_AVX512 = 2 } twofour_cpu_isa;

/* How a weight is held: see layout.h. */
typedef enum twofour_cpu_form {
  TWOFOUR_CPU_INT8 = 0,
  TWOFOUR_CPU_INT8_2OF4 = 1,
  TWOFOUR_CPU_INT8_4OF8 = 2,
  TWOFOUR_CPU_INT8_5OF8 = 3,
  TWOFOUR_CPU_INT8_6OF8 = 4,
  TWOFOUR_CPU_BF16 = 5,
  TWOFOUR_CPU_BF16_2OF4 = 6,
  TWOFOUR_CPU_BF16_4OF8 = 7,
  TWOFOUR_CPU_BF16_5OF8 = 8,
  TWOFOUR_CPU_BF16_6OF8 = 9
} twofour_cpu_form;

typedef enum twofour_cpu_type { TWOFOUR_CPU_FLOAT32 = 0, TWOFOUR_CPU_BFLOAT16 = 1 } twofour_cpu_type;

/* What is done to inputs x first. The int8 forms take the int8 roundings, the bf16 forms the others. */
typedef enum twofour_cpu_rounding {
  TWOFOUR_CPU_AS_IS = 0,       /* bfloat16 inputs alone */
  TWOFOUR_CPU_TO_INT8 = 1,     /* x * multiplier to nearest even, clamped */
  TWOFOUR_CPU_EACH_TOKEN = 2,  /* int8 by the largest element of x * multiplier (where there is one) of each token */
  TWOFOUR_CPU_TO_FP8 = 3       /* x * multiplier to nearest e4m3, saturated; held as bfloat16, as are fp8 weights */
} twofour_cpu_rounding;

typedef enum twofour_cpu_axis { TWOFOUR_CPU_ROWS = 0, TWOFOUR_CPU_INPUTS = 1 } twofour_cpu_axis;

/* One linear layer: y = (q w^T) * scale (* token scale) + bias, each step rounded to float32 once. A layer in two parts,
 * of which one is sparse, names the second as its `rest`: y has the rows of both, or x the inputs of both and y the sum of
 * their products, each rounded to y's type first. */
typedef struct twofour_cpu_linear {
  int32_t form; /* twofour_cpu_form */
  int32_t axis; /* twofour_cpu_axis along which `rest` follows */
  int64_t out_features, in_features;
  const void* weight;      /* packed */
  const float* scales;     /* [out_features], or NULL: `scale` */
  float scale;             /* what a sum is multiplied by */
  int32_t rounding;        /* twofour_cpu_rounding */
  const float* multiplier; /* [multipliers]; NULL where none is used */
  int64_t multipliers;     /* 1, or in_features */
  const float* bias;       /* [out_features] or NULL */
  const struct twofour_cpu_linear* rest; /* NULL: this is the whole layer. It has no rest of its own. */
} twofour_cpu_linear;

TWOFOUR_CPU_API int twofour_cpu_version(void);
TWOFOUR_CPU_API const char* twofour_cpu_last_error(void);

/* The instruction set in use, and whether bfloat16 products have instructions of their own (AVX512-BF16). */
TWOFOUR_CPU_API int twofour_cpu_isa_in_use(void);
TWOFOUR_CPU_API int twofour_cpu_has_bf16(void);
/* Takes a lesser instruction set: for tests and comparisons. */
TWOFOUR_CPU_API int twofour_cpu_use_isa(int isa);
/* Threads that share a product, the caller's included; more than the processors allowed to this process are not made.
 * Returns the number in use. */
TWOFOUR_CPU_API int twofour_cpu_set_threads(int threads);

TWOFOUR_CPU_API size_t twofour_cpu_weight_bytes(int form, int64_t out_features, int64_t in_features);
/* `values` [out_features, in_features] for a dense form; for one of n of m [out_features, in_features * n / m] with
 * `positions` [out_features, ceil(in_features / 8)] as plugins/sparsity/pattern.py defines them. */
TWOFOUR_CPU_API int twofour_cpu_pack(int form, int64_t out_features, int64_t in_features, const void* values,
                                     const uint8_t* positions, void* packed);
/* The dense weight [out_features, in_features] of a packed one. */
TWOFOUR_CPU_API int twofour_cpu_unpack(int form, int64_t out_features, int64_t in_features, const void* packed,
                                       void* weight);

/* y of inputs quantized before (int8 forms): q int8 [tokens, in_features]; token_scales [tokens] or NULL. */
TWOFOUR_CPU_API int twofour_cpu_matmul_int8(const twofour_cpu_linear* linear, int64_t tokens, const int8_t* q,
                                            const float* token_scales, int out_type, void* y);
/* y of inputs x [tokens, in_features] of `type`, which an int8 form quantizes itself; y has the same type. */
TWOFOUR_CPU_API int twofour_cpu_apply(const twofour_cpu_linear* linear, int64_t tokens, int type, const void* x,
                                      void* y);
/* Rows `ids` [count] of a dense bf16 weight: y [count, in_features] bfloat16. An embedding that is the output layer too
 * is held once. */
TWOFOUR_CPU_API int twofour_cpu_rows(const twofour_cpu_linear* linear, int64_t count, const int64_t* ids, void* y);
/* Several layers of one input, in one pass: y[i] [tokens, linears[i].out_features]. The int8 layers of one multiplier
 * quantize it once. */
TWOFOUR_CPU_API int twofour_cpu_apply_all(const twofour_cpu_linear* const* linears, int count, int64_t tokens, int type,
                                          const void* x, void* const* y);

/* A decoder block. Norms are RMSNorms; vectors have the type of the activations. */
typedef struct twofour_cpu_block {
  const twofour_cpu_linear *q, *k, *v, *o, *gate, *up, *down;
  const void *first_norm, *second_norm; /* [hidden] */
  const void *q_norm, *k_norm;          /* [head_dim], or NULL */
  float attention_scale;                /* of the scores, the cache's scale of keys included */
  float v_scale;                        /* of the attention's output; 1 for a 16-bit cache */
  float k_multiplier, v_multiplier;     /* what an int8 cache's numbers are multiplied by before they are rounded */
  int64_t window;                       /* positions that a token sees, its own included; 0: all */
  void *keys, *values;                  /* [pages, kv_heads, page_size, head_dim] */
} twofour_cpu_block;

/* One new token for each of `tokens` sequences. */
typedef struct twofour_cpu_step {
  int32_t type;       /* twofour_cpu_type of the activations */
  int32_t cache_int8; /* whether the cache holds int8; else numbers of `type` */
  int64_t tokens, hidden, heads, kv_heads, head_dim, intermediate;
  float eps;
  int32_t reserved;
  const void *cos, *sin;    /* [positions, head_dim] */
  const void* final_norm;   /* [hidden]: of the norm after the last block */
  const int64_t* positions; /* [tokens] */
  const int32_t* table;     /* [tokens, table_stride]: the pages of each sequence; NULL: sequence i has page i alone */
  int64_t table_stride, page_size;
} twofour_cpu_step;

/* Runs the blocks on x [tokens, hidden], in place, and adds the tokens' keys and values to the cache. */
TWOFOUR_CPU_API int twofour_cpu_decode(const twofour_cpu_step* step, const twofour_cpu_block* blocks, int count,
                                       void* x);

/* The parts of a block around an attention that the caller computes, for any number of new tokens a sequence.
 * before: x += add (where not NULL), norm, q, k and v [tokens, heads or kv_heads, head_dim], rotated.
 * after: from the attention [tokens, heads, head_dim], x += o of it, and out = the MLP's output, not yet added to x. */
TWOFOUR_CPU_API int twofour_cpu_before_attention(const twofour_cpu_step* step, const twofour_cpu_block* block, void* x,
                                                 void* add, void* q, void* k, void* v);
TWOFOUR_CPU_API int twofour_cpu_after_attention(const twofour_cpu_step* step, const twofour_cpu_block* block, void* x,
                                                void* attended, void* out);
/* x += add, and the norm after the last block: out [tokens, hidden]. */
TWOFOUR_CPU_API int twofour_cpu_final_norm(const twofour_cpu_step* step, void* x, void* add, void* out);

/* Causal attention of the last `queries` of `keys` positions of each sequence, all in bfloat16. Strides, in elements, are
 * those of sequences, heads and tokens; head_dim numbers lie side by side. out [sequences, queries, heads, head_dim]. */
typedef struct twofour_cpu_attention {
  int64_t sequences, queries, keys, heads, kv_heads, head_dim;
  int64_t window;          /* positions that a token sees, its own included; 0: all */
  float scale, v_scale;    /* of the scores; of the output */
  const void *q, *k, *v;
  void* out;
  int64_t q_strides[3], k_strides[3], v_strides[3];
} twofour_cpu_attention;

TWOFOUR_CPU_API int twofour_cpu_attend_prompts(const twofour_cpu_attention* attention);

/* Sum of `bytes` bytes read by all threads, 8 bytes at a time: what the memory gives at most. */
TWOFOUR_CPU_API uint64_t twofour_cpu_read(const void* memory, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif /* TWOFOUR_CPU_H_ */
