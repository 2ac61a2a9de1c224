// One sparse layer of a TensorRT engine: its weight on the host in the packed form, which depends on no GPU, and on each
// device in the forms its kernels read, made there at first use. Does not depend on TensorRT.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "twofour.h"

namespace twofour_tensorrt {

// A failure with its one-line message; the plugin logs it and returns an error to TensorRT.
struct Error {
  std::string message;
};
void check(twofour_status status);

// The kernel by number of tokens: the skinny one up to `skinny_tokens`, `wide_kernel` above. TensorRT times these against
// each other; its tactic number is the index + 1, as 0 means "no tactic".
struct Tactic {
  int64_t skinny_tokens;
  twofour_kernel wide_kernel;
};
constexpr Tactic kTactics[] = {{64, TWOFOUR_CUSPARSELT}, {16, TWOFOUR_CUSPARSELT}, {0, TWOFOUR_CUSPARSELT},
                               {64, TWOFOUR_CUBLASLT},   {16, TWOFOUR_CUBLASLT},   {0, TWOFOUR_CUBLASLT}};
constexpr int kTacticCount = sizeof kTactics / sizeof kTactics[0];

// The result of a search for a kernel at a number of tokens: valid for that GPU and library version only.
struct Choice {
  int32_t kernel = 0, sm = 0, version = 0, reserved = 0;
  int64_t tokens = 0;
  twofour_algorithm algorithm{};
};

struct Description {
  int32_t type = 0, out_type = 0, out_features = 0, in_features = 0;
  float scale = 1;
  int32_t tactic = 0;  // fixed by the builder's own measurement; 0: TensorRT's choice
  std::vector<float> channel_scales;
  std::vector<uint8_t> bias;  // of out_type
  std::vector<uint8_t> packed;
  twofour_stamp stamp{};
  std::vector<Choice> choices;  // searched while the engine was built
};

using Context = std::shared_ptr<twofour_context>;
// A context on the current device, or on the host where TWOFOUR_PLUGIN_DEVICE=host (the test harness).
Context make_context();
int current_device();

class Layer {
 public:
  // Packs a dense weight of out_features x in_features elements. Throws Error where it is not 2:4 or misaligned.
  static std::shared_ptr<Layer> from_dense(Description description, const void* weight);
  // Takes a packed weight. Throws Error where its stamp or size is not this library's.
  static std::shared_ptr<Layer> from_packed(Description description);

  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;
  ~Layer();

  const Description& description() const { return description_; }
  static twofour_kernel kernel(int tactic, int64_t tokens);
  // The tactics that this layer and device can run.
  std::vector<int32_t> tactics(twofour_context* context) const;
  // An upper bound for these tokens and any of the tactics, which grows with tokens. The builder requests the bound of
  // the most tokens from TensorRT, which does not pass the size to enqueue; each call stays within its own bound.
  size_t workspace_bytes(int64_t tokens) const;
  // Prepares all that enqueue needs for these tokens, so that it neither allocates nor plans.
  void prepare(twofour_context* context, int tactic, int64_t tokens);
  // While an engine is built: the fastest algorithm of each kernel that a tactic may run at these tokens. Allocates, and
  // takes a while; on the host there is nothing to time.
  void search(twofour_context* context, int64_t tokens);
  // Called for a new execution context: sets the searched algorithms, and prepares the weights and plans that `tactic`
  // needs at the searched tokens. Errors are reported at the first call that needs the failed part.
  void warm_up(twofour_context* context, int tactic);
  void enqueue(twofour_context* context, int tactic, int64_t tokens, const void* x, void* y, void* workspace,
               void* stream);

 private:
  struct Forms {
    void* weights[3] = {nullptr, nullptr, nullptr};  // by kernel
    void* channel_scales = nullptr;
    void* bias = nullptr;
  };

  explicit Layer(Description description) : description_(std::move(description)) {}
  twofour_gemm gemm(int kernel, int64_t tokens, const Forms* forms) const;
  Forms& forms(int device);
  void make_weight(twofour_context* context, int device, Forms& forms, int kernel);
  void prepare_locked(twofour_context* context, int tactic, int64_t tokens);
  void search_kernel(twofour_context* context, int device, Forms& forms, int kernel, int64_t tokens);

  Description description_;
  std::mutex mutex_;
  std::map<int, Forms> forms_;
};

}  // namespace twofour_tensorrt
