/* libtwofour: GEMMs whose weight is sparse: 2:4, or 4:8, 5:8, 6:8. A C API with no CUDA types in it.
 *
 * Every function computes or prepares  y[tokens, out_features] = scale * (x[tokens, in_features] w^T) + bias
 * for a weight w[out_features, in_features] in the pattern n:m of the kernel: at most n nonzeros in each aligned group of
 * m inputs.
 * All matrices are row-major, and dense in memory but for x and y where the problem gives their pitches. Pointers are
 * device pointers, or host pointers where the context was made for TWOFOUR_HOST.
 *
 * Rules:
 * - A function returns a status; twofour_last_error() returns one line per thread: the error and its fix.
 * - twofour_matmul allocates no device memory, searches nothing and never synchronises: it may be captured in a
 *   CUDA graph. The caller owns the workspace, and may share one buffer among all layers of a stream.
 * - A context belongs to one device, and its calls to one stream at a time.
 */
#ifndef TWOFOUR_H_
#define TWOFOUR_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TWOFOUR_API __attribute__((visibility("default")))
#define TWOFOUR_VERSION 103 /* 0.1.3 */
#define TWOFOUR_HOST (-1)   /* device number: runs the skinny kernel's own source on the CPU, thread by thread */

typedef enum twofour_status {
  TWOFOUR_OK = 0,
  TWOFOUR_INVALID_ARGUMENT = 1,
  TWOFOUR_NOT_2_4 = 2,              /* the weight breaks the kernel's pattern; the message names row and group */
  TWOFOUR_MISALIGNED = 3,           /* a size or pointer the kernel cannot take; the message names what works */
  TWOFOUR_NO_GPU = 4,
  TWOFOUR_SM_UNSUPPORTED = 5,       /* no sparse tensor cores, no fp8, or the library was not built for this GPU */
  TWOFOUR_LIBRARY_MISSING = 6,      /* cuSPARSELt or cuBLASLt cannot be loaded */
  TWOFOUR_LIBRARY_TOO_OLD = 7,
  TWOFOUR_WRONG_BUILD = 8,          /* a prepared weight made for another SM, library version or shape */
  TWOFOUR_OUT_OF_MEMORY = 9,
  TWOFOUR_WORKSPACE_TOO_SMALL = 10,
  TWOFOUR_NOT_PLANNED = 11,         /* the stream is capturing and twofour_plan was not called for this problem */
  TWOFOUR_UNSUPPORTED = 12,         /* the kernel has no implementation of this problem */
  TWOFOUR_CUDA_ERROR = 13,
  TWOFOUR_CUSPARSELT_ERROR = 14,
  TWOFOUR_CUBLASLT_ERROR = 15
} twofour_status;

typedef enum twofour_type { TWOFOUR_FP16 = 0, TWOFOUR_BF16 = 1, TWOFOUR_INT8 = 2, TWOFOUR_FP8 = 3 /* e4m3 */ } twofour_type;

typedef enum twofour_kernel {
  TWOFOUR_SKINNY = 0,     /* 2:4 by mma.sp, 1 to 64 tokens; weight packed by twofour, the same for every GPU */
  TWOFOUR_CUSPARSELT = 1, /* weight compressed by cuSPARSELt, for this GPU and library version */
  TWOFOUR_CUBLASLT = 2,   /* weight dense */
  TWOFOUR_SKINNY_4OF8 = 3, /* n:8, expanded in registers for dense mma, 1 to 64 tokens; packed by twofour, as above */
  TWOFOUR_SKINNY_5OF8 = 4,
  TWOFOUR_SKINNY_6OF8 = 5,
  TWOFOUR_HYBRID = 6,      /* 2:4 in its first rows or inputs, dense in the others, in one launch: 1 to 64 tokens, SM90 */
  TWOFOUR_HYBRID_4OF8 = 7  /* the same with 4:8 */
} twofour_kernel;

typedef struct twofour_gemm {
  int32_t kernel;   /* twofour_kernel */
  int32_t type;     /* twofour_type of x and w */
  int32_t out_type; /* TWOFOUR_FP16 or TWOFOUR_BF16 */
  int32_t accumulate; /* 1: added to what y holds, in fp32; TWOFOUR_CUBLASLT only */
  int64_t tokens, out_features, in_features;
  float scale;                 /* used where channel_scales is NULL: input scale times weight scale */
  const float* channel_scales; /* [out_features] or NULL */
  const void* bias;            /* [out_features] of out_type, or NULL */
  int64_t x_pitch, y_pitch;    /* elements from row to row, where x or y is a slice of a wider matrix; 0: dense */
  int64_t sparse_rows, sparse_inputs; /* of the hybrid kernels: how many of the first rows, or of the first inputs, hold the
                                         pattern; one of the two is 0 */
} twofour_gemm;

/* The inputs that a prepared weight depends on; store the stamp with the weight and check it before use. */
typedef struct twofour_stamp {
  int32_t kernel, type;
  int64_t out_features, in_features;
  int32_t sm;      /* 90 for 9.0; 0 where the layout is the same on every GPU */
  int32_t version; /* of cuSPARSELt, or of twofour's layout */
} twofour_stamp;

/* The choice a search makes for one (kernel, type, shape, tokens bucket). Each kernel defines its own encoding. */
typedef struct twofour_algorithm {
  uint64_t words[8];
} twofour_algorithm;

typedef struct twofour_search_result {
  float best_us;                /* median time of the chosen algorithm, caches flushed before each run */
  int32_t tried, over_workspace; /* algorithms timed; algorithms skipped because they need more workspace */
} twofour_search_result;

typedef struct twofour_info {
  int32_t device, sm, multiprocessors;
  int32_t cusparselt_version; /* 801 for 0.8.1; 0 where it cannot be loaded */
  int32_t cublaslt_version;   /* 0 where it cannot be loaded */
  int64_t l2_bytes;
} twofour_info;

typedef struct twofour_context twofour_context;

TWOFOUR_API int twofour_version(void);
TWOFOUR_API const char* twofour_status_name(twofour_status status);
TWOFOUR_API const char* twofour_last_error(void);
/* The version of the library that a kernel runs on, loaded without a GPU: 801 is cuSPARSELt 0.8.1. Returns an error
 * where it is missing or too old. For the skinny kernels it is the version of the packed layout. */
TWOFOUR_API twofour_status twofour_library_version(twofour_kernel kernel, int32_t* version);

/* device: a CUDA ordinal, or TWOFOUR_HOST. */
TWOFOUR_API twofour_status twofour_create(int device, twofour_context** context);
TWOFOUR_API void twofour_destroy(twofour_context* context);
TWOFOUR_API twofour_status twofour_get_info(twofour_context* context, twofour_info* info);

/* TWOFOUR_NOT_2_4 with the first row and group (of 4 inputs) that hold more than 2 nonzeros; -0.0 counts as zero.
 * Synchronises the stream. */
TWOFOUR_API twofour_status twofour_check(twofour_context* context, twofour_type type, int64_t out_features,
                                         int64_t in_features, const void* weight, void* stream, int64_t* row,
                                         int64_t* group);

/* A dense weight -> the form gemm->kernel reads. Checks the pattern, turns -0.0 into 0. gemm->tokens is ignored.
 * `prepared` holds twofour_weight_bytes() bytes. May allocate and synchronises: for load time only. */
TWOFOUR_API twofour_status twofour_weight_bytes(twofour_context* context, const twofour_gemm* gemm, size_t* bytes);
TWOFOUR_API twofour_status twofour_prepare_weight(twofour_context* context, const twofour_gemm* gemm,
                                                  const void* weight, void* prepared, void* stream);
/* The skinny and the hybrid kernels only: the packed form back to the dense weight. */
TWOFOUR_API twofour_status twofour_unpack_weight(twofour_context* context, const twofour_gemm* gemm,
                                                 const void* prepared, void* weight, void* stream);
TWOFOUR_API twofour_status twofour_get_stamp(twofour_context* context, const twofour_gemm* gemm, twofour_stamp* stamp);
/* TWOFOUR_WRONG_BUILD where a weight with this stamp cannot be used for gemm on this context. */
TWOFOUR_API twofour_status twofour_check_stamp(twofour_context* context, const twofour_gemm* gemm,
                                               const twofour_stamp* stamp);

/* Builds and keeps the plan for this exact problem: host work only. Call it for each token count before a capture. */
TWOFOUR_API twofour_status twofour_plan(twofour_context* context, const twofour_gemm* gemm);
TWOFOUR_API twofour_status twofour_workspace_bytes(twofour_context* context, const twofour_gemm* gemm, size_t* bytes);
/* The algorithms that a search would try: up to `capacity` of them, and their number. */
TWOFOUR_API twofour_status twofour_list_algorithms(twofour_context* context, const twofour_gemm* gemm,
                                                   twofour_algorithm* algorithms, int32_t capacity, int32_t* count);
/* Times the kernel's algorithms that fit the workspace and keeps the fastest for the problem's tokens bucket.
 * `flush` of `flush_bytes` (more than the L2 cache) is overwritten before each run; may be NULL. */
TWOFOUR_API twofour_status twofour_search(twofour_context* context, const twofour_gemm* gemm, const void* x,
                                          const void* prepared, void* y, void* workspace, size_t workspace_bytes,
                                          void* flush, size_t flush_bytes, void* stream,
                                          twofour_search_result* result);
TWOFOUR_API twofour_status twofour_get_algorithm(twofour_context* context, const twofour_gemm* gemm,
                                                 twofour_algorithm* algorithm);
TWOFOUR_API twofour_status twofour_set_algorithm(twofour_context* context, const twofour_gemm* gemm,
                                                 const twofour_algorithm* algorithm);

/* q[tokens, in_features] = x * multiplier, rounded to nearest even and clamped, as TWOFOUR_INT8 or TWOFOUR_FP8.
 * x is fp16 or bf16; `multiplier` holds 1 / input scale, once (count 1) or per input (count in_features). */
TWOFOUR_API twofour_status twofour_quantize(twofour_context* context, twofour_type type, twofour_type x_type,
                                            int64_t tokens, int64_t in_features, const void* x,
                                            const float* multiplier, int64_t count, void* q, void* stream);

TWOFOUR_API twofour_status twofour_matmul(twofour_context* context, const twofour_gemm* gemm, const void* x,
                                          const void* prepared, void* y, void* workspace, size_t workspace_bytes,
                                          void* stream);

#ifdef __cplusplus
}
#endif
#endif /* TWOFOUR_H_ */
