// The interface of cuSPARSELt and cuBLASLt: keeps a plan per exact problem, enumerates and chooses algorithms.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <tuple>
#include <vector>

#include "layout.h"
#include "status.h"

namespace twofour {

class Backend {
 public:
  virtual ~Backend() = default;
  virtual int version() const = 0;
  // Throws MISALIGNED or UNSUPPORTED with the size or kernel that works.
  virtual void validate(const twofour_gemm& gemm) const = 0;
  virtual size_t weight_bytes(const twofour_gemm& gemm) = 0;
  virtual void prepare_weight(const twofour_gemm& gemm, const void* weight, void* prepared, cudaStream_t stream) = 0;
  // All algorithms worth timing for the problem.
  virtual std::vector<twofour_algorithm> algorithms(const twofour_gemm& gemm) = 0;
  // Builds the plan, with the algorithm given (the library's default where null), and keeps it.
  virtual void plan(const twofour_gemm& gemm, const twofour_algorithm* algorithm) = 0;
  virtual bool planned(const twofour_gemm& gemm) const = 0;
  // The next three need a plan.
  virtual size_t workspace_bytes(const twofour_gemm& gemm) = 0;
  virtual twofour_algorithm algorithm(const twofour_gemm& gemm) = 0;
  virtual void matmul(const twofour_gemm& gemm, const void* x, const void* prepared, void* y, uint8_t* workspace,
                      cudaStream_t stream) = 0;
};

// Problems with the same key share a plan: all layers of one shape without bias do. Scales are passed at each call.
using ProblemKey = std::tuple<int, int, int64_t, int64_t, int64_t, bool, const void*, int64_t, int64_t>;
inline ProblemKey problem_key(const twofour_gemm& g) {
  return {g.type,   g.out_type,  g.tokens,   g.out_features, g.in_features, g.channel_scales != nullptr,
          g.bias, x_pitch(g), y_pitch(g)};
}

constexpr size_t kWorkspaceAlignment = 256;
inline size_t aligned(size_t bytes) { return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment; }

inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

inline cudaDataType cuda_type(int type) {
  switch (type) {
    case TWOFOUR_FP16: return CUDA_R_16F;
    case TWOFOUR_BF16: return CUDA_R_16BF;
    case TWOFOUR_INT8: return CUDA_R_8I;
    default: return CUDA_R_8F_E4M3;
  }
}

}  // namespace twofour
