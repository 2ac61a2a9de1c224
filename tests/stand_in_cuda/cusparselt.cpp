// Stands in for cuSPARSELt: multiplies on the CPU, and refuses what the real library is known to refuse (its header, the
// messages in its binary). Objects must be alive when used; the workspace is scribbled over; a compressed weight holds
// values and positions of its own. STAND_IN_FP8=fp32 takes fp8 to fp32 only.
#include <cusparseLt.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "numbers.h"

namespace {

struct Matrix {
  int magic;
  int64_t rows, cols, ld;
  cudaDataType type;
  cusparseOrder_t order;
  bool structured;
};
struct Product {
  int magic;
  const Matrix *a, *b, *d;
  int alpha_vector;
  const void* bias;
};
struct Selection {
  int magic;
  int id, split, mode;
};
struct Plan {
  int magic;
  Product product;
  Selection selection;
};
constexpr int kHandle = 1, kMatrix = 2, kProduct = 3, kSelection = 4, kPlan = 5, kAlgorithms = 3;

template <class T, class Opaque>
T* as(Opaque* opaque, int magic) {
  T* object = reinterpret_cast<T*>(const_cast<unsigned char*>(opaque->data));
  return magic == 0 || object->magic == magic ? object : nullptr;
}

int sm() {
  const char* text = std::getenv("STAND_IN_SM");
  return text != nullptr ? std::atoi(text) : 90;
}

size_t workspace_of(const Selection& s) { return 1000 + 100000 * static_cast<size_t>(s.id); }

cusparseStatus_t describe(cusparseLtMatDescriptor_t* out, int64_t rows, int64_t cols, int64_t ld, uint32_t alignment,
                          cudaDataType type, cusparseOrder_t order, bool structured) {
  const int64_t multiple = (structured ? 32 : 16) / static_cast<int64_t>(bytes_of(type));
  if (rows <= 0 || cols <= 0 || ld < (order == CUSPARSE_ORDER_ROW ? cols : rows)) return CUSPARSE_STATUS_INVALID_VALUE;
  if (rows % multiple || cols % multiple || ld % multiple || alignment == 0 || alignment % 16) return CUSPARSE_STATUS_NOT_SUPPORTED;
  *as<Matrix>(out, 0) = {kMatrix, rows, cols, ld, type, order, structured};
  return CUSPARSE_STATUS_SUCCESS;
}

bool zero(cudaDataType type, const uint8_t* p) {  // as the library sees it: -0.0 is a nonzero
  uint16_t bits = 0;
  std::memcpy(&bits, p, bytes_of(type));
  return bits == 0;
}

}  // namespace

extern "C" {

cusparseStatus_t cusparseLtInit(cusparseLtHandle_t* handle) {
  return *reinterpret_cast<int*>(handle->data) = kHandle, sm() < 80 ? CUSPARSE_STATUS_ARCH_MISMATCH : CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtDestroy(const cusparseLtHandle_t*) { return CUSPARSE_STATUS_SUCCESS; }
cusparseStatus_t cusparseLtGetProperty(libraryPropertyType which, int* value) {
  return *value = which == MAJOR_VERSION ? 0 : which == MINOR_VERSION ? 8 : 1, CUSPARSE_STATUS_SUCCESS;
}
const char* cusparseLtGetErrorString(cusparseStatus_t status) {
  return status == CUSPARSE_STATUS_NOT_SUPPORTED ? "operation not supported" : "stand-in error";
}
cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t*, cusparseLtMatDescriptor_t* out, int64_t rows,
                                               int64_t cols, int64_t ld, uint32_t alignment, cudaDataType type,
                                               cusparseOrder_t order) {
  return describe(out, rows, cols, ld, alignment, type, order, false);
}
cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t*, cusparseLtMatDescriptor_t* out, int64_t rows,
                                                    int64_t cols, int64_t ld, uint32_t alignment, cudaDataType type,
                                                    cusparseOrder_t order, cusparseLtSparsity_t) {
  return describe(out, rows, cols, ld, alignment, type, order, true);
}
cusparseStatus_t cusparseLtMatDescriptorDestroy(const cusparseLtMatDescriptor_t* m) {
  Matrix* matrix = as<Matrix>(m, kMatrix);
  if (matrix == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  return matrix->magic = 0, CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulDescriptorInit(const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* out,
                                                cusparseOperation_t op_a, cusparseOperation_t op_b,
                                                const cusparseLtMatDescriptor_t* a, const cusparseLtMatDescriptor_t* b,
                                                const cusparseLtMatDescriptor_t* c, const cusparseLtMatDescriptor_t* d,
                                                cusparseComputeType compute) {
  const Matrix *ma = as<Matrix>(a, kMatrix), *mb = as<Matrix>(b, kMatrix), *md = as<Matrix>(d, kMatrix);
  if (!ma || !mb || !md || c != d || !ma->structured || mb->structured || md->structured) return CUSPARSE_STATUS_INVALID_VALUE;
  if (op_a != CUSPARSE_OPERATION_NON_TRANSPOSE || op_b != CUSPARSE_OPERATION_TRANSPOSE || ma->order != CUSPARSE_ORDER_ROW ||
      mb->order != CUSPARSE_ORDER_ROW || md->order != CUSPARSE_ORDER_COL)
    return CUSPARSE_STATUS_NOT_SUPPORTED;  // the one form that every type takes
  if (ma->cols != mb->cols || md->rows != ma->rows || md->cols != mb->rows || ma->type != mb->type) return CUSPARSE_STATUS_INVALID_VALUE;
  const cudaDataType in = ma->type, to = md->type;
  const char* fp8 = std::getenv("STAND_IN_FP8");
  const bool only_fp32 = fp8 != nullptr && std::string(fp8) == "fp32";
  const bool supported =
      in == CUDA_R_8I ? compute == CUSPARSE_COMPUTE_32I && (to == CUDA_R_32I || to == CUDA_R_16F || to == CUDA_R_16BF)
      : in == CUDA_R_8F_E4M3
          ? compute == CUSPARSE_COMPUTE_32F && sm() >= 89 && (to == CUDA_R_32F || (!only_fp32 && (to == CUDA_R_16F || to == CUDA_R_16BF)))
          : compute == CUSPARSE_COMPUTE_32F && in == to;
  if (!supported) return CUSPARSE_STATUS_NOT_SUPPORTED;
  *as<Product>(out, 0) = {kProduct, ma, mb, md, 0, nullptr};
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulDescSetAttribute(const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* descriptor,
                                                  cusparseLtMatmulDescAttribute_t attribute, const void* data, size_t size) {
  Product* p = as<Product>(descriptor, kProduct);
  if (p == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  if (attribute == CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING && size == sizeof(int)) {
    if (p->a->type != CUDA_R_8I) return CUSPARSE_STATUS_NOT_SUPPORTED;  // "only supported in INT8 input, INT32 compute"
    return std::memcpy(&p->alpha_vector, data, size), CUSPARSE_STATUS_SUCCESS;
  }
  if (attribute == CUSPARSELT_MATMUL_BIAS_POINTER && size == sizeof(void*))
    return std::memcpy(&p->bias, data, size), CUSPARSE_STATUS_SUCCESS;
  return CUSPARSE_STATUS_INVALID_VALUE;
}

cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t*, cusparseLtMatmulAlgSelection_t* out,
                                                  const cusparseLtMatmulDescriptor_t* m, cusparseLtMatmulAlg_t) {
  if (as<Product>(m, kProduct) == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  return *as<Selection>(out, 0) = {kSelection, 0, 1, 0}, CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(const cusparseLtMatmulAlgSelection_t* s) {
  Selection* selection = as<Selection>(s, kSelection);
  if (selection == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  return selection->magic = 0, CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSetAttribute(const cusparseLtHandle_t*, cusparseLtMatmulAlgSelection_t* s,
                                                 cusparseLtMatmulAlgAttribute_t attribute, const void* data, size_t size) {
  Selection* selection = as<Selection>(s, kSelection);
  int value = 0;
  if (selection == nullptr || size != sizeof value) return CUSPARSE_STATUS_INVALID_VALUE;
  std::memcpy(&value, data, size);
  const bool before90 = sm() < 90;
  switch (attribute) {
    case CUSPARSELT_MATMUL_ALG_CONFIG_ID:
      if (value < 0 || value >= kAlgorithms) return CUSPARSE_STATUS_INVALID_VALUE;
      return selection->id = value, CUSPARSE_STATUS_SUCCESS;
    case CUSPARSELT_MATMUL_SPLIT_K:
      if (before90 ? value < 1 : value != 1 && value != -1) return CUSPARSE_STATUS_INVALID_VALUE;
      return selection->split = value, CUSPARSE_STATUS_SUCCESS;
    case CUSPARSELT_MATMUL_SPLIT_K_MODE:
      if (before90 != (value == CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL || value == CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS))
        return CUSPARSE_STATUS_INVALID_VALUE;
      return selection->mode = value, CUSPARSE_STATUS_SUCCESS;
    default: return CUSPARSE_STATUS_INVALID_VALUE;
  }
}
cusparseStatus_t cusparseLtMatmulAlgGetAttribute(const cusparseLtHandle_t*, const cusparseLtMatmulAlgSelection_t* s,
                                                 cusparseLtMatmulAlgAttribute_t attribute, void* data, size_t) {
  const Selection* selection = as<Selection>(s, kSelection);
  if (selection == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  *static_cast<int*>(data) = attribute == CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID ? kAlgorithms : selection->id;
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t*, cusparseLtMatmulPlan_t* out,
                                          const cusparseLtMatmulDescriptor_t* m, const cusparseLtMatmulAlgSelection_t* s) {
  const Product* product = as<Product>(m, kProduct);
  const Selection* selection = as<Selection>(s, kSelection);
  if (product == nullptr || selection == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  return *as<Plan>(out, 0) = {kPlan, *product, *selection}, CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulPlanDestroy(const cusparseLtMatmulPlan_t* p) {
  Plan* plan = as<Plan>(p, kPlan);
  if (plan == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  return plan->magic = 0, CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t*, const cusparseLtMatmulPlan_t* p, size_t* bytes) {
  return *bytes = workspace_of(as<Plan>(p, kPlan)->selection), CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t*, const cusparseLtMatmulPlan_t* p, const void* alpha, const void* a,
                                  const void* b, const void* beta, const void* c, void* d, void* workspace,
                                  cudaStream_t* streams, int32_t stream_count) {
  const Plan* plan = as<Plan>(p, kPlan);
  if (plan == nullptr || workspace == nullptr || stream_count != 1 || streams == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  const Product& product = plan->product;
  const Matrix &w = *product.a, &x = *product.b, &y = *product.d;
  if (w.magic != kMatrix || x.magic != kMatrix || y.magic != kMatrix || *static_cast<const float*>(beta) != 0 || c != d)
    return CUSPARSE_STATUS_INVALID_VALUE;
  const size_t size = bytes_of(w.type);
  const auto* values = static_cast<const uint8_t*>(a);
  const uint8_t* positions = values + static_cast<size_t>(w.rows * w.cols / 2) * size;
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t n = 0; n < w.rows; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < w.cols / 2; ++i) {
        const int64_t group = (n * w.cols / 2 + i) / 2, column = i / 2 * 4 + (positions[group] >> (2 * (i % 2)) & 3);
        sum += load(w.type, values, n * w.cols / 2 + i) * load(x.type, b, m * x.ld + column);
      }
      const float scale = product.alpha_vector != 0 ? static_cast<const float*>(alpha)[n] : *static_cast<const float*>(alpha);
      double value = static_cast<double>(static_cast<float>(sum) * scale);
      if (product.bias != nullptr) value += load(w.type == CUDA_R_8I ? CUDA_R_32F : y.type, product.bias, n);
      store(y.type, d, m * y.ld + n, value);
    }
  std::memset(workspace, 0xEE, workspace_of(plan->selection));
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtSpMMACompressedSize2(const cusparseLtHandle_t*, const cusparseLtMatDescriptor_t* m, size_t* size,
                                                size_t* buffer) {
  const Matrix* w = as<Matrix>(m, kMatrix);
  *size = static_cast<size_t>(w->rows * w->cols / 2) * bytes_of(w->type) + static_cast<size_t>(w->rows * w->cols / 4);
  *buffer = 333;
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtSpMMACompress2(const cusparseLtHandle_t*, const cusparseLtMatDescriptor_t* m, int is_a,
                                          cusparseOperation_t op, const void* dense, void* out, void* buffer, cudaStream_t) {
  const Matrix* w = as<Matrix>(m, kMatrix);
  if (w == nullptr || is_a != 1 || op != CUSPARSE_OPERATION_NON_TRANSPOSE || buffer == nullptr) return CUSPARSE_STATUS_INVALID_VALUE;
  const size_t size = bytes_of(w->type);
  const auto* source = static_cast<const uint8_t*>(dense);
  auto* values = static_cast<uint8_t*>(out);
  uint8_t* positions = values + static_cast<size_t>(w->rows * w->cols / 2) * size;
  for (int64_t group = 0; group < w->rows * w->cols / 4; ++group) {
    int kept[2], count = 0;
    for (int i = 0; i < 4; ++i) {
      if (zero(w->type, source + static_cast<size_t>(4 * group + i) * size)) continue;
      if (count == 2) return CUSPARSE_STATUS_EXECUTION_FAILED;  // the real one would multiply rubbish
      kept[count++] = i;
    }
    for (int i = 3; count < 2; --i)  // pads from the right
      if (count == 0 || kept[0] != i) kept[count++] = i;
    positions[group] = static_cast<uint8_t>(kept[0] | kept[1] << 2);
    for (int i = 0; i < 2; ++i)
      std::memcpy(values + static_cast<size_t>(2 * group + i) * size, source + static_cast<size_t>(4 * group + kept[i]) * size, size);
  }
  std::memset(buffer, 0xEE, 333);
  return CUSPARSE_STATUS_SUCCESS;
}

}  // extern "C"
