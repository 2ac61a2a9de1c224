#include "cublaslt.h"

#include <cublasLt.h>

#include <map>

#include "cuda_check.h"
#include "dynamic_library.h"
#include "weights.h"

namespace twofour {

namespace {

#define TWOFOUR_CUBLASLT_FUNCTIONS(F)                                                                              \
  F(cublasLtCreate) F(cublasLtDestroy) F(cublasLtGetVersion) F(cublasLtGetStatusString) F(cublasLtMatmul)           \
  F(cublasLtMatmulDescCreate) F(cublasLtMatmulDescDestroy) F(cublasLtMatmulDescSetAttribute)                        \
  F(cublasLtMatrixLayoutCreate) F(cublasLtMatrixLayoutDestroy) F(cublasLtMatmulPreferenceCreate)                    \
  F(cublasLtMatmulPreferenceDestroy) F(cublasLtMatmulPreferenceSetAttribute) F(cublasLtMatmulAlgoGetHeuristic)      \
  F(cublasLtMatmulAlgoCheck)

struct Library {
#define TWOFOUR_DECLARE(name) decltype(&::name) name;
  TWOFOUR_CUBLASLT_FUNCTIONS(TWOFOUR_DECLARE)
#undef TWOFOUR_DECLARE

  Library() {
    const DynamicLibrary library("TWOFOUR_CUBLASLT", {"libcublasLt.so.13", "libcublasLt.so.12"},
                                 "pip install nvidia-cublas");
#define TWOFOUR_FIND(name) library.find(#name, name);
    TWOFOUR_CUBLASLT_FUNCTIONS(TWOFOUR_FIND)
#undef TWOFOUR_FIND
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const twofour_status code = status == CUBLAS_STATUS_NOT_SUPPORTED   ? TWOFOUR_UNSUPPORTED
                              : status == CUBLAS_STATUS_ARCH_MISMATCH ? TWOFOUR_SM_UNSUPPORTED
                              : status == CUBLAS_STATUS_ALLOC_FAILED  ? TWOFOUR_OUT_OF_MEMORY
                                                                      : TWOFOUR_CUBLASLT_ERROR;
  fail(code, "%s: %s", call, library().cublasLtGetStatusString(status));
}

#define TWOFOUR_CALL(name, ...) check(library().name(__VA_ARGS__), #name)

constexpr size_t kMostWorkspace = size_t{32} << 20;
constexpr int kMostAlgorithms = 16;

// int8 has no fp16 output in cuBLASLt, and per-channel scales are not in every version: both leave raw sums.
bool wants_raw_sums(const twofour_gemm& g) { return g.type == TWOFOUR_INT8 || g.channel_scales != nullptr; }

// Column-major: D[N, M] = alpha op(A)[N, K] B[K, M] with A the row-major weight [N, K] seen as K x N, transposed.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  twofour_algorithm algorithm{};
  size_t workspace = 0;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (cublasLtMatrixLayout_t layout : {a, b, d})
      if (layout != nullptr) library().cublasLtMatrixLayoutDestroy(layout);
    if (operation != nullptr) library().cublasLtMatmulDescDestroy(operation);
  }
};

class Cublaslt final : public Backend {
 public:
  explicit Cublaslt(int sm) : sm_(sm) { TWOFOUR_CALL(cublasLtCreate, &handle_); }
  ~Cublaslt() override {
    plans_.clear();
    library().cublasLtDestroy(handle_);
  }

  int version() const override { return static_cast<int>(library().cublasLtGetVersion()); }

  void validate(const twofour_gemm& g) const override {
    const int64_t multiple = element_bytes(g.type) == 2 ? 8 : 16;
    if (g.out_features % multiple != 0 || g.in_features % multiple != 0)
      fail(TWOFOUR_MISALIGNED, "cuBLASLt takes %s weights in multiples of %lld: [%lld, %lld] would fit as [%lld, %lld]",
           type_name(g.type), static_cast<long long>(multiple), static_cast<long long>(g.out_features),
           static_cast<long long>(g.in_features), static_cast<long long>(round_up(g.out_features, multiple)),
           static_cast<long long>(round_up(g.in_features, multiple)));
    if (g.type == TWOFOUR_FP8 && sm_ < 89)
      fail(TWOFOUR_SM_UNSUPPORTED, "fp8 needs compute capability 8.9 or newer, this GPU has %d.%d; use int8", sm_ / 10, sm_ % 10);
    if (element_bytes(g.type) == 2 && g.out_type != g.type)
      fail(TWOFOUR_UNSUPPORTED, "the dense kernel writes %s for %s weights, not %s", type_name(g.type),
           type_name(g.type), type_name(g.out_type));
  }

  size_t weight_bytes(const twofour_gemm& g) override {
    return static_cast<size_t>(g.out_features * g.in_features) * element_bytes(g.type);
  }

  void prepare_weight(const twofour_gemm& g, const void* weight, void* prepared, cudaStream_t stream) override {
    if (weight == prepared) return;
    twofour::check(cudaMemcpyAsync(prepared, weight, weight_bytes(g), cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  }

  std::vector<twofour_algorithm> algorithms(const twofour_gemm& g) override {
    Plan p;
    describe(g, p);
    std::vector<twofour_algorithm> all;
    for (const cublasLtMatmulHeuristicResult_t& result : heuristics(p, kMostAlgorithms)) all.push_back(pack(result.algo));
    return all;
  }

  void plan(const twofour_gemm& g, const twofour_algorithm* algorithm) override {
    validate(g);
    auto p = std::make_unique<Plan>();
    describe(g, *p);
    if (algorithm != nullptr) {
      cublasLtMatmulHeuristicResult_t result{};
      const cublasLtMatmulAlgo_t algo = unpack(*algorithm);
      TWOFOUR_CALL(cublasLtMatmulAlgoCheck, handle_, p->operation, p->a, p->b, p->d, p->d, &algo, &result);
      p->algorithm = *algorithm;
      p->workspace = result.workspaceSize;
    } else {
      const auto best = heuristics(*p, 1);
      p->algorithm = pack(best.front().algo);
      p->workspace = best.front().workspaceSize;
    }
    plans_[problem_key(g)] = std::move(p);
  }

  bool planned(const twofour_gemm& g) const override { return plans_.count(problem_key(g)) != 0; }
  twofour_algorithm algorithm(const twofour_gemm& g) override { return find(g).algorithm; }

  size_t workspace_bytes(const twofour_gemm& g) override {
    const size_t sums = wants_raw_sums(g) ? aligned(static_cast<size_t>(g.tokens * g.out_features) * 4) : 0;
    return aligned(find(g).workspace) + sums;
  }

  // Workspace: the library's own | raw sums.
  void matmul(const twofour_gemm& g, const void* x, const void* prepared, void* y, uint8_t* workspace,
              cudaStream_t stream) override {
    Plan& p = find(g);
    const bool raw = wants_raw_sums(g);
    void* const output = raw ? workspace + aligned(p.workspace) : y;
    const int one = 1, zero = 0;
    const float scale = raw ? 1.0f : g.scale, kept = raw ? 0.0f : static_cast<float>(g.accumulate);
    const bool integer = g.type == TWOFOUR_INT8;
    const cublasLtMatmulAlgo_t algo = unpack(p.algorithm);
    TWOFOUR_CALL(cublasLtMatmul, handle_, p.operation, integer ? static_cast<const void*>(&one) : &scale, prepared, p.a,
                 x, p.b, integer ? static_cast<const void*>(&zero) : &kept, output, p.d, output, p.d, &algo,
                 workspace, p.workspace, stream);
    if (raw) apply_epilogue(g, output, y, stream);
  }

 private:
  void describe(const twofour_gemm& g, Plan& p) {
    const bool integer = g.type == TWOFOUR_INT8, raw = wants_raw_sums(g);
    const cublasOperation_t transpose = CUBLAS_OP_T;
    TWOFOUR_CALL(cublasLtMatmulDescCreate, &p.operation, integer ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                 integer ? CUDA_R_32I : CUDA_R_32F);
    set(p, CUBLASLT_MATMUL_DESC_TRANSA, transpose);
    if (g.type == TWOFOUR_FP8) set(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});  // the fastest dense there is
    if (g.bias != nullptr && !raw) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
      set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
      set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(cuda_type(g.out_type)));
    }
    const auto n = static_cast<uint64_t>(g.out_features), k = static_cast<uint64_t>(g.in_features);
    const auto m = static_cast<uint64_t>(g.tokens);
    const cudaDataType out = !raw ? cuda_type(g.out_type) : integer ? CUDA_R_32I : CUDA_R_32F;
    TWOFOUR_CALL(cublasLtMatrixLayoutCreate, &p.a, cuda_type(g.type), k, n, g.in_features);
    TWOFOUR_CALL(cublasLtMatrixLayoutCreate, &p.b, cuda_type(g.type), k, m, x_pitch(g));
    TWOFOUR_CALL(cublasLtMatrixLayoutCreate, &p.d, out, n, m, raw ? g.out_features : y_pitch(g));
  }

  template <class T>
  void set(Plan& p, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    TWOFOUR_CALL(cublasLtMatmulDescSetAttribute, p.operation, attribute, &value, sizeof value);
  }

  std::vector<cublasLtMatmulHeuristicResult_t> heuristics(const Plan& p, int most) {
    cublasLtMatmulPreference_t preference = nullptr;
    TWOFOUR_CALL(cublasLtMatmulPreferenceCreate, &preference);
    std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(most));
    int found = 0;
    cublasStatus_t status = library().cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kMostWorkspace, sizeof kMostWorkspace);
    if (status == CUBLAS_STATUS_SUCCESS)
      status = library().cublasLtMatmulAlgoGetHeuristic(handle_, p.operation, p.a, p.b, p.d, p.d, preference, most,
                                                        results.data(), &found);
    library().cublasLtMatmulPreferenceDestroy(preference);
    check(found > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
    results.resize(static_cast<size_t>(found));
    return results;
  }

  static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(twofour_algorithm));
  static twofour_algorithm pack(const cublasLtMatmulAlgo_t& algo) {
    twofour_algorithm out;
    for (int i = 0; i < 8; ++i) out.words[i] = algo.data[i];
    return out;
  }
  static cublasLtMatmulAlgo_t unpack(const twofour_algorithm& algorithm) {
    cublasLtMatmulAlgo_t out;
    for (int i = 0; i < 8; ++i) out.data[i] = algorithm.words[i];
    return out;
  }

  Plan& find(const twofour_gemm& g) { return *plans_.at(problem_key(g)); }

  int sm_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<ProblemKey, std::unique_ptr<Plan>> plans_;
};

}  // namespace

std::unique_ptr<Backend> make_cublaslt(int sm) { return std::make_unique<Cublaslt>(sm); }
int cublaslt_version() { return static_cast<int>(library().cublasLtGetVersion()); }

}  // namespace twofour
