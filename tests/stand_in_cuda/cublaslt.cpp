// Stands in for cuBLASLt: column-major products on the CPU, for the one form that twofour asks for.
#include <cublasLt.h>

#include <cstring>

#include "numbers.h"

struct cublasLtContext {
  int nothing;
};

namespace {

struct Operation {
  cublasComputeType_t compute;
  cudaDataType scale;
  int transpose_a = 0, epilogue = CUBLASLT_EPILOGUE_DEFAULT, bias_type = -1;
  const void* bias = nullptr;
};
struct Layout {
  cudaDataType type;
  int64_t rows, cols, ld;
};

Operation& operation(cublasLtMatmulDesc_t d) { return *reinterpret_cast<Operation*>(d); }
Layout& layout(cublasLtMatrixLayout_t l) { return *reinterpret_cast<Layout*>(l); }

size_t workspace_of(const cublasLtMatmulAlgo_t& algo) { return static_cast<size_t>(algo.data[0]) * 100000; }

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = new cublasLtContext{}, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
size_t cublasLtGetVersion(void) { return 130000; }
const char* cublasLtGetStatusString(cublasStatus_t) { return "stand-in error"; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t scale) {
  *d = reinterpret_cast<cublasLtMatmulDesc_t>(new Operation{compute, scale});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return delete &operation(d), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, const void* data,
                                              size_t size) {
  Operation& op = operation(d);
  const auto take = [&](auto& field) {
    if (size != sizeof field) return CUBLAS_STATUS_INVALID_VALUE;
    return std::memcpy(&field, data, size), CUBLAS_STATUS_SUCCESS;
  };
  int8_t flag;
  switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return take(op.transpose_a);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return take(op.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return take(op.bias);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return take(op.bias_type);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM: return take(flag);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
  *l = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return delete &layout(l), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) { return *p = nullptr, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t la,
                                       cublasLtMatrixLayout_t lb, cublasLtMatrixLayout_t lc, cublasLtMatrixLayout_t ld,
                                       const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* result) {
  const Operation& op = operation(d);
  const Layout &a = layout(la), &b = layout(lb), &y = layout(ld);
  const bool integer = a.type == CUDA_R_8I, wide = a.type == CUDA_R_16F || a.type == CUDA_R_16BF;
  if (lc != ld || op.transpose_a != CUBLAS_OP_T || a.type != b.type || a.rows != b.rows || y.rows != a.cols || y.cols != b.cols)
    return CUBLAS_STATUS_INVALID_VALUE;
  const bool types = integer ? op.compute == CUBLAS_COMPUTE_32I && op.scale == CUDA_R_32I && y.type == CUDA_R_32I
                             : op.compute == CUBLAS_COMPUTE_32F && op.scale == CUDA_R_32F && (!wide || y.type == a.type || y.type == CUDA_R_32F);
  if (!types || a.ld * static_cast<int64_t>(bytes_of(a.type)) % 16 || b.ld < b.rows || y.ld < y.rows || algo->data[0] > 2) return CUBLAS_STATUS_NOT_SUPPORTED;
  result->workspaceSize = workspace_of(*algo);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t y,
                                              cublasLtMatmulPreference_t, int most, cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  *found = 0;
  for (int i = 0; i < most && i < 3; ++i) {
    std::memset(&results[i], 0, sizeof results[i]);
    results[i].algo.data[0] = static_cast<uint64_t>(i);
    const cublasStatus_t status = cublasLtMatmulAlgoCheck(h, d, a, b, c, y, &results[i].algo, &results[i]);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    ++*found;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t la,
                              const void* b, cublasLtMatrixLayout_t lb, const void* beta, const void* c, cublasLtMatrixLayout_t,
                              void* y, cublasLtMatrixLayout_t ly, const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspace_bytes, cudaStream_t) {
  const Operation& op = operation(d);
  const Layout &w = layout(la), &x = layout(lb), &out = layout(ly);
  if (c != y || workspace_bytes < workspace_of(*algo)) return CUBLAS_STATUS_INVALID_VALUE;
  const double scale = op.scale == CUDA_R_32I ? *static_cast<const int*>(alpha) : *static_cast<const float*>(alpha);
  const double kept = op.scale == CUDA_R_32I ? *static_cast<const int*>(beta) : *static_cast<const float*>(beta);
  for (int64_t m = 0; m < x.cols; ++m)
    for (int64_t n = 0; n < w.cols; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < w.rows; ++k) sum += load(w.type, a, n * w.ld + k) * load(x.type, b, m * x.ld + k);
      double value = sum * scale;
      if (op.epilogue == CUBLASLT_EPILOGUE_BIAS) value += load(static_cast<cudaDataType>(op.bias_type), op.bias, n);
      if (kept != 0) value += kept * load(out.type, c, m * out.ld + n);
      store(out.type, y, m * out.ld + n, value);
    }
  if (workspace_of(*algo) != 0) std::memset(workspace, 0xEE, workspace_of(*algo));
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
