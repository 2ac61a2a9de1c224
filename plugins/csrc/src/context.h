// A context: one device, its libraries, the chosen algorithms. api.cpp wraps it in the C API.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "backend.h"
#include "hybrid.h"
#include "streamed.h"

struct twofour_context {
 public:
  explicit twofour_context(int device);
  ~twofour_context();
  twofour_context(const twofour_context&) = delete;
  twofour_context& operator=(const twofour_context&) = delete;

  bool host() const { return info.device == TWOFOUR_HOST; }
  void validate(const twofour_gemm& gemm) const;
  size_t weight_bytes(const twofour_gemm& gemm);
  void prepare_weight(const twofour_gemm& gemm, const void* weight, void* prepared, cudaStream_t stream);
  void unpack_weight(const twofour_gemm& gemm, const void* prepared, void* weight, cudaStream_t stream);
  int64_t first_violation(twofour::Form form, const twofour::Extent& extent, const void* weight, cudaStream_t stream);
  twofour_stamp stamp(const twofour_gemm& gemm);
  void plan(const twofour_gemm& gemm);
  size_t workspace_bytes(const twofour_gemm& gemm);
  std::vector<twofour_algorithm> algorithms(const twofour_gemm& gemm);
  twofour_algorithm algorithm(const twofour_gemm& gemm);
  void set_algorithm(const twofour_gemm& gemm, const twofour_algorithm& algorithm);
  void matmul(const twofour_gemm& gemm, const void* x, const void* prepared, void* y, void* workspace, size_t bytes,
              cudaStream_t stream);

  twofour_info info{};
  std::mutex mutex;

 private:
  twofour::Backend& backend(int kernel);
  int splits(const twofour_gemm& gemm) const;
  std::optional<twofour::StreamedPlan> streamed(const twofour_gemm& gemm) const;  // none: the staged kernel runs
  bool can_stream() const { return host() || info.sm >= twofour::kStreamedSm; }
  void validate_hybrid(const twofour_gemm& gemm) const;
  twofour::HybridPlan hybrid(const twofour_gemm& gemm) const;
  std::vector<twofour_algorithm> hybrid_algorithms(const twofour_gemm& gemm) const;
  void require_pattern(twofour::Form form, const twofour::Extent& extent, const void* weight, cudaStream_t stream);
  void pack(twofour::Form form, const twofour::Extent& extent, const void* weight, uint8_t* packed, cudaStream_t stream);
  void unpack(twofour::Form form, const twofour::Extent& extent, const uint8_t* packed, void* weight, cudaStream_t stream);
  void run_packed(const twofour_gemm& gemm, const void* x, const void* prepared, void* y, void* workspace,
                  cudaStream_t stream);

  // kernel, type, out_type, out_features, in_features, sparse_rows, sparse_inputs, bucket
  using BucketKey = std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
  static BucketKey bucket_key(const twofour_gemm& gemm);

  std::map<BucketKey, twofour_algorithm> algorithms_;
  twofour::Multiprocessors multiprocessors_;
  std::map<int, std::unique_ptr<twofour::Backend>> backends_;  // by twofour_kernel
  std::vector<unsigned> host_counters_;
  unsigned* counters_ = nullptr;  // of the skinny kernel's tiles
};

namespace twofour {

// Whether the product is our own, of a weight that we pack.
inline bool is_packed(const twofour_gemm& g) { return is_skinny(g) || is_hybrid(g); }

// A plan as an algorithm: splits of K, 0 staged or 1 streamed, and for the latter the members of StreamedChoices after splits.
twofour_algorithm words_of(const StreamedPlan& plan);
StreamedChoices choices_of(const twofour_algorithm& algorithm);

// Token counts that share an algorithm: 1, then up to 8, 16, 32, ...
int64_t tokens_bucket(int64_t tokens);

// Makes a context's device current within a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1, device_;
};

}  // namespace twofour
