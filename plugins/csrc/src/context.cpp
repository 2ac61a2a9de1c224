#include "context.h"

#include <algorithm>
#include <set>

#include "cublaslt.h"
#include "cuda_check.h"
#include "cusparselt.h"
#include "hybrid_problem.h"
#include "skinny.h"

namespace twofour {

int64_t tokens_bucket(int64_t tokens) {
  if (tokens <= 1) return 1;  // one token has its own algorithms
  int64_t bucket = 8;
  while (bucket < tokens) bucket *= 2;
  return bucket;
}

twofour_algorithm words_of(const StreamedPlan& plan) {
  return {{static_cast<uint64_t>(plan.splits), 1, static_cast<uint64_t>(plan.share),
           static_cast<uint64_t>(plan.per_multiprocessor), static_cast<uint64_t>(plan.prefetch), 0, 0, 0}};
}

StreamedChoices choices_of(const twofour_algorithm& algorithm) {
  const uint64_t* words = algorithm.words;
  return {static_cast<int>(words[0]), static_cast<int>(words[2]), static_cast<int>(words[3]), static_cast<int>(words[4])};
}

DeviceScope::DeviceScope(int device) : device_(device) {
  if (device_ == TWOFOUR_HOST) return;
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
}

DeviceScope::~DeviceScope() {
  if (device_ != TWOFOUR_HOST && previous_ != device_) cudaSetDevice(previous_);
}

}  // namespace twofour

using namespace twofour;

twofour_context::twofour_context(int device) {
  info.device = device;
  info.multiprocessors = 1;
  if (device == TWOFOUR_HOST) {
    host_counters_.assign(kSkinnyCounters, 0);
    counters_ = host_counters_.data();
    return;
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0)
    fail(TWOFOUR_NO_GPU, "no CUDA GPU here (%s); the torch backend runs on the CPU: engine.backend=torch",
         error != cudaSuccess ? cudaGetErrorString(error) : "0 devices");
  if (device < 0 || device >= count) fail(TWOFOUR_NO_GPU, "device %d is not one of the %d GPUs here", device, count);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  info.sm = 10 * properties.major + properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.l2_bytes = properties.l2CacheSize;
  if (info.sm < 80)
    fail(TWOFOUR_SM_UNSUPPORTED, "%s has compute capability %d.%d: sparse tensor cores begin at 8.0 (A100); build dense",
         properties.name, properties.major, properties.minor);
  const DeviceScope scope(device);
  multiprocessors_ = {properties.multiProcessorCount, properties.sharedMemPerMultiprocessor, properties.sharedMemPerBlockOptin};
  skinny_configure();
  if (can_stream()) {
    streamed_configure(multiprocessors_);
    hybrid_configure(multiprocessors_);
  }
  check(cudaMalloc(reinterpret_cast<void**>(&counters_), kSkinnyCounters * sizeof(unsigned)), "cudaMalloc");
  check(cudaMemset(counters_, 0, kSkinnyCounters * sizeof(unsigned)), "cudaMemset");
}

twofour_context::~twofour_context() {
  if (!host() && counters_ != nullptr) cudaFree(counters_);
}

Backend& twofour_context::backend(int kernel) {
  std::unique_ptr<Backend>& slot = backends_[kernel];
  if (slot != nullptr) return *slot;
  if (host()) fail(TWOFOUR_NO_GPU, "%s runs on a GPU only; the host runs the skinny kernel", kernel_name(kernel));
  slot = kernel == TWOFOUR_CUSPARSELT ? make_cusparselt(info.sm) : make_cublaslt(info.sm);
  return *slot;
}

twofour_context::BucketKey twofour_context::bucket_key(const twofour_gemm& g) {
  const bool in_part = is_hybrid(g);
  return {g.kernel, g.type, g.out_type, g.out_features, g.in_features, in_part ? g.sparse_rows : 0,
          in_part ? g.sparse_inputs : 0, tokens_bucket(g.tokens)};
}

int twofour_context::splits(const twofour_gemm& g) const {
  const SkinnyGeometry geometry = skinny_geometry(form_of(g), g.tokens, g.out_features, g.in_features);
  const auto chosen = algorithms_.find(bucket_key(g));
  if (chosen == algorithms_.end()) return default_splits(geometry, info.multiprocessors);
  return static_cast<int>(std::clamp<uint64_t>(chosen->second.words[0], 1, static_cast<uint64_t>(geometry.max_splits)));
}

std::optional<StreamedPlan> twofour_context::streamed(const twofour_gemm& g) const {
  const auto chosen = algorithms_.find(bucket_key(g));
  if (chosen == algorithms_.end() || chosen->second.words[1] != 1) return std::nullopt;
  return streamed_plan(form_of(g), g.tokens, g.out_features, g.in_features, multiprocessors_, choices_of(chosen->second));
}

void twofour_context::plan(const twofour_gemm& g) {
  if (g.tokens < 1) fail(TWOFOUR_INVALID_ARGUMENT, "tokens=%lld: at least 1", static_cast<long long>(g.tokens));
  if (!is_packed(g)) {
    const auto chosen = algorithms_.find(bucket_key(g));
    if (chosen != algorithms_.end()) {
      try {
        return backend(g.kernel).plan(g, &chosen->second);
      } catch (const Failure& failure) {
        // The search ran at another token count of the bucket or another epilogue; the algorithm does not fit this one.
        if (failure.status == TWOFOUR_MISALIGNED || failure.status == TWOFOUR_SM_UNSUPPORTED) throw;
      }
    }
    return backend(g.kernel).plan(g, nullptr);
  }
  if (g.tokens > kMaxSkinnyTokens)
    fail(TWOFOUR_UNSUPPORTED, "tokens=%lld: the %s kernel takes 1 to %d; use %scublaslt", static_cast<long long>(g.tokens),
         is_hybrid(g) ? "hybrid" : "skinny", kMaxSkinnyTokens, g.kernel == TWOFOUR_SKINNY ? "cusparselt or " : "");
}

size_t twofour_context::workspace_bytes(const twofour_gemm& g) {
  if (!is_packed(g)) {
    if (!backend(g.kernel).planned(g)) plan(g);
    return backend(g.kernel).workspace_bytes(g);
  }
  plan(g);
  if (is_hybrid(g)) return hybrid(g).launch.workspace_bytes;
  if (const auto plan = streamed(g)) return plan->workspace_bytes;
  return skinny_workspace_bytes(skinny_geometry(form_of(g), g.tokens, g.out_features, g.in_features), splits(g));
}

std::vector<twofour_algorithm> twofour_context::algorithms(const twofour_gemm& g) {
  if (is_hybrid(g)) return hybrid_algorithms(g);
  if (!is_skinny(g)) return backend(g.kernel).algorithms(g);
  const SkinnyGeometry geometry = skinny_geometry(form_of(g), g.tokens, g.out_features, g.in_features);
  std::vector<twofour_algorithm> all;
  for (int s : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32})
    if (s <= geometry.max_splits) all.push_back({{static_cast<uint64_t>(s), 0, 0, 0, 0, 0, 0, 0}});
  if (!can_stream()) return all;
  std::set<std::tuple<int, int, int>> launches;
  for (int splits : {1, 2, 4})
    for (const auto& [share, blocks] : {std::pair(1, 1), std::pair(2, 1), std::pair(1, 2)}) {
      const auto plan = streamed_plan(form_of(g), g.tokens, g.out_features, g.in_features, multiprocessors_,
                                      {splits, share, blocks, 0});
      if (plan && launches.insert({plan->splits, plan->blocks, plan->depth}).second) all.push_back(words_of(*plan));
    }
  return all;
}

twofour_algorithm twofour_context::algorithm(const twofour_gemm& g) {
  if (is_hybrid(g)) return words_of(hybrid(g).launch);
  if (is_skinny(g)) {
    if (const auto plan = streamed(g)) return words_of(*plan);
    return {{static_cast<uint64_t>(splits(g)), 0, 0, 0, 0, 0, 0, 0}};
  }
  if (!backend(g.kernel).planned(g)) plan(g);
  return backend(g.kernel).algorithm(g);
}

void twofour_context::set_algorithm(const twofour_gemm& g, const twofour_algorithm& algorithm) {
  if (!is_packed(g)) backend(g.kernel).plan(g, &algorithm);  // throws where it does not fit
  else if (is_hybrid(g) && algorithm.words[1] != 1)
    fail(TWOFOUR_INVALID_ARGUMENT, "variant %llu of the hybrid kernel: it is streamed (1)",
         static_cast<unsigned long long>(algorithm.words[1]));
  else if (algorithm.words[1] > 1)
    fail(TWOFOUR_INVALID_ARGUMENT, "variant %llu of the skinny kernel is not staged (0) or streamed (1)",
         static_cast<unsigned long long>(algorithm.words[1]));
  else if (algorithm.words[1] == 1 && !can_stream())
    fail(TWOFOUR_SM_UNSUPPORTED, "the streamed skinny kernel needs compute capability 9.0 or newer, this GPU has %d.%d; use "
         "the staged one (0)", info.sm / 10, info.sm % 10);
  algorithms_[bucket_key(g)] = algorithm;
}

void twofour_context::run_packed(const twofour_gemm& g, const void* x, const void* prepared, void* y, void* workspace,
                                 cudaStream_t stream) {
  SkinnyProblem problem{};
  problem.x = static_cast<const uint8_t*>(x);
  problem.weight = static_cast<const uint8_t*>(prepared);
  problem.y = y;
  problem.channel_scales = g.channel_scales;
  problem.bias = g.bias;
  problem.scale = g.scale;
  problem.out_type = g.out_type;
  problem.tokens = static_cast<int>(g.tokens);
  problem.out_features = g.out_features;
  problem.in_features = g.in_features;
  problem.x_pitch = x_pitch(g);
  problem.y_pitch = y_pitch(g);
  problem.partials = static_cast<uint32_t*>(workspace);
  problem.counters = counters_;
  if (is_hybrid(g)) {
    const HybridPlan plan = hybrid(g);
    const Form sparse{g.type, hybrid_keep(g.kernel)};
    if (host()) hybrid_simulate(sparse, hybrid_problem(g, plan, problem), plan.launch);
    else hybrid_launch(sparse, hybrid_problem(g, plan, problem), plan.launch, stream);
    return;
  }
  if (const auto plan = streamed(g)) {
    problem.splits = plan->splits;
    problem.depth = plan->depth;
    problem.prefetch = plan->prefetch;
    if (host()) streamed_simulate(form_of(g), problem, *plan);
    else streamed_launch(form_of(g), problem, *plan, stream);
    return;
  }
  problem.splits = splits(g);
  if (host()) skinny_simulate(form_of(g), problem);
  else skinny_launch(form_of(g), problem, stream);
}

void twofour_context::matmul(const twofour_gemm& g, const void* x, const void* prepared, void* y, void* workspace,
                             size_t bytes, cudaStream_t stream) {
  if (!is_packed(g) && !backend(g.kernel).planned(g)) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone)
      fail(TWOFOUR_NOT_PLANNED, "%s has no plan for %lld tokens and the stream is capturing; call twofour_plan first",
           kernel_name(g.kernel), static_cast<long long>(g.tokens));
    plan(g);
  }
  const size_t needed = workspace_bytes(g);
  if (needed > bytes || (needed > 0 && workspace == nullptr))
    fail(TWOFOUR_WORKSPACE_TOO_SMALL, "%s needs %zu bytes of workspace for %lld tokens, got %zu", kernel_name(g.kernel),
         needed, static_cast<long long>(g.tokens), bytes);
  for (const void* pointer : {x, prepared, static_cast<const void*>(y), static_cast<const void*>(workspace)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      fail(TWOFOUR_MISALIGNED, "a tensor begins at %p, not at a multiple of 16 bytes; copy it", pointer);
  if (is_packed(g)) run_packed(g, x, prepared, y, workspace, stream);
  else backend(g.kernel).matmul(g, x, prepared, y, static_cast<uint8_t*>(workspace), stream);
}
