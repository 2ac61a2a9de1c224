#include "cusparselt.h"

#include <map>

#include "cuda_check.h"
#include "cusparselt_library.h"
#include "weights.h"

namespace twofour {

namespace {

// Tokens are the columns of the dense operand and of D: a multiple of 16 bytes of either.
int64_t token_multiple(int type) { return 16 / element_bytes(type); }

// Where each scale is applied. Per-channel scales exist in the library for int8 only, and its int8 bias is fp32; both
// other cases leave raw sums (int32 or fp32) that our epilogue finishes.
bool wants_raw_sums(const twofour_gemm& g) {
  if (g.type == TWOFOUR_INT8) return g.bias != nullptr;
  return g.channel_scales != nullptr;
}

struct Plan {
  cusparseLtMatDescriptor_t w, x, d;
  cusparseLtMatmulDescriptor_t matmul;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;
  int built = 0;  // how many of w, x, d, selection, plan are to be destroyed
  bool raw = false;
  int64_t tokens = 0;  // padded
  size_t workspace = 0;
  twofour_algorithm algorithm{};

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (built > 4) library().cusparseLtMatmulPlanDestroy(&plan);
    if (built > 3) library().cusparseLtMatmulAlgSelectionDestroy(&selection);
    if (built > 2) library().cusparseLtMatDescriptorDestroy(&d);
    if (built > 1) library().cusparseLtMatDescriptorDestroy(&x);
    if (built > 0) library().cusparseLtMatDescriptorDestroy(&w);
  }
};

void copy_rows(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t row_bytes, int64_t rows,
               cudaStream_t stream) {
  twofour::check(cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, row_bytes, static_cast<size_t>(rows),
                                   cudaMemcpyDeviceToDevice, stream), "cudaMemcpy2DAsync");
}

class Cusparselt final : public Backend {
 public:
  explicit Cusparselt(int sm) : sm_(sm) { TWOFOUR_CALL(cusparseLtInit, &handle_); }
  ~Cusparselt() override {
    plans_.clear();
    library().cusparseLtDestroy(&handle_);
  }

  int version() const override { return library().version; }

  void validate(const twofour_gemm& g) const override {
    const int64_t multiple = 32 / element_bytes(g.type);
    if (g.out_features % multiple != 0 || g.in_features % multiple != 0)
      fail(TWOFOUR_MISALIGNED,
           "cuSPARSELt takes %s weights in multiples of %lld: [%lld, %lld] would fit as [%lld, %lld]; use the skinny "
           "or the dense kernel, or pad",
           type_name(g.type), static_cast<long long>(multiple), static_cast<long long>(g.out_features),
           static_cast<long long>(g.in_features), static_cast<long long>(round_up(g.out_features, multiple)),
           static_cast<long long>(round_up(g.in_features, multiple)));
    if (g.type == TWOFOUR_FP8 && sm_ < 89)
      fail(TWOFOUR_SM_UNSUPPORTED, "fp8 needs compute capability 8.9 or newer, this GPU has %d.%d; use int8", sm_ / 10, sm_ % 10);
    if (element_bytes(g.type) == 2 && g.out_type != g.type)
      fail(TWOFOUR_UNSUPPORTED, "cuSPARSELt writes %s for %s weights, not %s", type_name(g.type), type_name(g.type),
           type_name(g.out_type));
    if (element_bytes(g.type) == 2 && g.channel_scales != nullptr)  // no fp32 output to scale afterwards either
      fail(TWOFOUR_UNSUPPORTED, "cuSPARSELt takes no channel_scales with %s weights; fold them into the weight",
           type_name(g.type));
  }

  size_t weight_bytes(const twofour_gemm& g) override {
    size_t bytes = 0, buffer = 0;
    cusparseLtMatDescriptor_t w;
    describe_weight(g, &w);
    const cusparseStatus_t status = library().cusparseLtSpMMACompressedSize2(&handle_, &w, &bytes, &buffer);
    library().cusparseLtMatDescriptorDestroy(&w);
    check(status, "cusparseLtSpMMACompressedSize2");
    return bytes;
  }

  void prepare_weight(const twofour_gemm& g, const void* weight, void* prepared, cudaStream_t stream) override {
    size_t bytes = 0, buffer = 0;
    const size_t dense = aligned(static_cast<size_t>(g.out_features * g.in_features) * element_bytes(g.type));
    cusparseLtMatDescriptor_t w;
    describe_weight(g, &w);
    uint8_t* scratch = nullptr;
    try {
      TWOFOUR_CALL(cusparseLtSpMMACompressedSize2, &handle_, &w, &bytes, &buffer);
      twofour::check(cudaMalloc(reinterpret_cast<void**>(&scratch), dense + buffer), "cudaMalloc of compression scratch");
      copy_canonical(g.type, g.out_features * g.in_features, weight, scratch, stream);
      TWOFOUR_CALL(cusparseLtSpMMACompress2, &handle_, &w, 1, CUSPARSE_OPERATION_NON_TRANSPOSE, scratch, prepared,
                   scratch + dense, stream);
      twofour::check(cudaStreamSynchronize(stream), "compression");
    } catch (...) {
      library().cusparseLtMatDescriptorDestroy(&w);
      cudaFree(scratch);
      throw;
    }
    library().cusparseLtMatDescriptorDestroy(&w);
    twofour::check(cudaFree(scratch), "cudaFree");
  }

  std::vector<twofour_algorithm> algorithms(const twofour_gemm& g) override {
    plan(g, nullptr);
    // One of the fp16 algorithms of 0.8.1 is an illegal instruction on an H200 ([8192, 8192], 1 token), after which the
    // process can no longer use CUDA: on such GPUs only the library's default is tried.
    if (g.type == TWOFOUR_FP16 && sm_ >= 90) return {find(g).algorithm};
    int count = 0;
    TWOFOUR_CALL(cusparseLtMatmulAlgGetAttribute, &handle_, &find(g).selection, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID,
                 &count, sizeof count);
    // words: configuration, split-K, split-K mode. On SM90 and newer the library takes a split-K of 1 or -1 (its
    // own choice, in a mode); older GPUs take any small number, in one or two kernels.
    struct Split {
      int factor, mode;
    };
    const std::vector<Split> before = {{1, 0},
                                       {2, CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL},
                                       {4, CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL},
                                       {4, CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS}};
    const std::vector<Split> since90 = {{1, 0}, {-1, CUSPARSELT_SPLITK}, {-1, CUSPARSELT_STREAMK}};
    std::vector<twofour_algorithm> all;
    for (int id = 0; id < count; ++id)
      for (const Split& split : sm_ < 90 ? before : since90)
        all.push_back({{static_cast<uint64_t>(id), static_cast<uint64_t>(split.factor),
                        static_cast<uint64_t>(split.mode), 0, 0, 0, 0, 0}});
    return all;
  }

  void plan(const twofour_gemm& g, const twofour_algorithm* algorithm) override {
    validate(g);
    auto fresh = std::make_unique<Plan>();
    try {
      build(g, algorithm, wants_raw_sums(g), *fresh);
    } catch (const Failure& failure) {
      // The library lacks this combination on this GPU; raw sums and our epilogue compute the same.
      if (failure.status != TWOFOUR_UNSUPPORTED || wants_raw_sums(g) || element_bytes(g.type) == 2) throw;
      fresh = std::make_unique<Plan>();
      build(g, algorithm, true, *fresh);
    }
    plans_[key(g)] = std::move(fresh);
  }

  bool planned(const twofour_gemm& g) const override { return plans_.count(key(g)) != 0; }
  twofour_algorithm algorithm(const twofour_gemm& g) override { return find(g).algorithm; }

  size_t workspace_bytes(const twofour_gemm& g) override {
    const Plan& p = find(g);
    return aligned(p.workspace) + staged_x(g, p) + staged_y(g, p);
  }

  // Workspace: the library's own | x padded to the library's tokens, or gathered | y padded or dense, or raw sums.
  void matmul(const twofour_gemm& g, const void* x, const void* prepared, void* y, uint8_t* workspace,
              cudaStream_t stream) override {
    Plan& p = find(g);
    uint8_t* const padded_x = workspace + aligned(p.workspace);
    uint8_t* const padded_y = padded_x + staged_x(g, p);
    const void* input = x;
    if (staged_x(g, p) != 0) {
      const size_t row = static_cast<size_t>(g.in_features) * element_bytes(g.type);
      const size_t bytes = static_cast<size_t>(g.tokens) * row, rest = static_cast<size_t>(p.tokens - g.tokens) * row;
      copy_rows(padded_x, row, x, static_cast<size_t>(x_pitch(g)) * element_bytes(g.type), row, g.tokens, stream);
      if (rest != 0) twofour::check(cudaMemsetAsync(padded_x + bytes, 0, rest, stream), "cudaMemsetAsync");
      input = padded_x;
    }
    void* const output = staged_y(g, p) != 0 ? padded_y : y;
    const float scale = p.raw ? 1.0f : g.scale, beta = 0.0f;
    const void* alpha = !p.raw && g.channel_scales != nullptr ? static_cast<const void*>(g.channel_scales) : &scale;
    TWOFOUR_CALL(cusparseLtMatmul, &handle_, &p.plan, alpha, prepared, input, &beta, output, output, workspace, &stream, 1);
    if (p.raw) {
      apply_epilogue(g, output, y, stream);
    } else if (output != y) {
      const size_t row = static_cast<size_t>(g.out_features) * 2;
      copy_rows(y, static_cast<size_t>(y_pitch(g)) * 2, output, row, row, g.tokens, stream);
    }
  }

 private:
  void describe_weight(const twofour_gemm& g, cusparseLtMatDescriptor_t* w) {
    TWOFOUR_CALL(cusparseLtStructuredDescriptorInit, &handle_, w, g.out_features, g.in_features, g.in_features, 16,
                 cuda_type(g.type), CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT);
  }

  void build(const twofour_gemm& g, const twofour_algorithm* algorithm, bool raw, Plan& p) {
    const cudaDataType sums = g.type == TWOFOUR_INT8 ? CUDA_R_32I : CUDA_R_32F;
    p.raw = raw;
    p.tokens = round_up(g.tokens, token_multiple(g.type));
    describe_weight(g, &p.w), ++p.built;
    TWOFOUR_CALL(cusparseLtDenseDescriptorInit, &handle_, &p.x, p.tokens, g.in_features, g.in_features, 16,
                 cuda_type(g.type), CUSPARSE_ORDER_ROW), ++p.built;
    TWOFOUR_CALL(cusparseLtDenseDescriptorInit, &handle_, &p.d, g.out_features, p.tokens, g.out_features, 16,
                 raw ? sums : cuda_type(g.out_type), CUSPARSE_ORDER_COL), ++p.built;
    TWOFOUR_CALL(cusparseLtMatmulDescriptorInit, &handle_, &p.matmul, CUSPARSE_OPERATION_NON_TRANSPOSE,
                 CUSPARSE_OPERATION_TRANSPOSE, &p.w, &p.x, &p.d, &p.d,
                 g.type == TWOFOUR_INT8 ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F);
    if (!raw && g.channel_scales != nullptr) {
      const int on = 1;
      TWOFOUR_CALL(cusparseLtMatmulDescSetAttribute, &handle_, &p.matmul, CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING, &on,
                   sizeof on);
    }
    if (!raw && g.bias != nullptr)
      TWOFOUR_CALL(cusparseLtMatmulDescSetAttribute, &handle_, &p.matmul, CUSPARSELT_MATMUL_BIAS_POINTER, &g.bias,
                   sizeof g.bias);
    TWOFOUR_CALL(cusparseLtMatmulAlgSelectionInit, &handle_, &p.selection, &p.matmul, CUSPARSELT_MATMUL_ALG_DEFAULT),
        ++p.built;
    if (algorithm != nullptr) {
      p.algorithm = *algorithm;
      const int words[] = {static_cast<int>(algorithm->words[0]), static_cast<int>(algorithm->words[1]),
                           static_cast<int>(algorithm->words[2])};
      set(p, CUSPARSELT_MATMUL_ALG_CONFIG_ID, words[0]);
      if (words[1] != 1) {
        set(p, CUSPARSELT_MATMUL_SPLIT_K, words[1]);
        set(p, CUSPARSELT_MATMUL_SPLIT_K_MODE, words[2]);
      }
    } else {
      int id = 0;
      TWOFOUR_CALL(cusparseLtMatmulAlgGetAttribute, &handle_, &p.selection, CUSPARSELT_MATMUL_ALG_CONFIG_ID, &id, sizeof id);
      p.algorithm = {{static_cast<uint64_t>(id), 1, 0, 0, 0, 0, 0, 0}};
    }
    TWOFOUR_CALL(cusparseLtMatmulPlanInit, &handle_, &p.plan, &p.matmul, &p.selection), ++p.built;
    TWOFOUR_CALL(cusparseLtMatmulGetWorkspace, &handle_, &p.plan, &p.workspace);
  }

  void set(Plan& p, cusparseLtMatmulAlgAttribute_t attribute, int value) {
    TWOFOUR_CALL(cusparseLtMatmulAlgSetAttribute, &handle_, &p.selection, attribute, &value, sizeof value);
  }

  static size_t staged_x(const twofour_gemm& g, const Plan& p) {
    if (p.tokens == g.tokens && x_pitch(g) == g.in_features) return 0;
    return aligned(static_cast<size_t>(p.tokens * g.in_features) * element_bytes(g.type));
  }
  static size_t staged_y(const twofour_gemm& g, const Plan& p) {
    const size_t element = p.raw ? 4 : 2;
    if (p.tokens == g.tokens && y_pitch(g) == g.out_features && !p.raw) return 0;
    return aligned(static_cast<size_t>(p.tokens * g.out_features) * element);
  }

  // Token counts with the same padding share a plan, so prefills of all lengths need few plans. The library reads dense
  // matrices: slices are staged.
  static ProblemKey key(twofour_gemm g) {
    g.x_pitch = g.y_pitch = 0;
    g.tokens = round_up(g.tokens, token_multiple(g.type));
    return problem_key(g);
  }

  Plan& find(const twofour_gemm& g) { return *plans_.at(key(g)); }

  int sm_;
  cusparseLtHandle_t handle_;
  std::map<ProblemKey, std::unique_ptr<Plan>> plans_;
};

}  // namespace

std::unique_ptr<Backend> make_cusparselt(int sm) { return std::make_unique<Cusparselt>(sm); }
int cusparselt_version() { return library().version; }

}  // namespace twofour
