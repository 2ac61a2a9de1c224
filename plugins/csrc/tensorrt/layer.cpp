#include "layer.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "device_memory.h"

namespace twofour_tensorrt {

namespace {

constexpr size_t kLibraryWorkspace = size_t{32} << 20;  // for cuBLASLt's and cuSPARSELt's own, and for split sums

size_t element_bytes(int type) { return type == TWOFOUR_FP16 || type == TWOFOUR_BF16 ? 2 : 1; }

void require(bool condition, const std::string& message) {
  if (!condition) throw Error{message};
}

void validate(const Description& d) {
  require(d.type >= TWOFOUR_FP16 && d.type <= TWOFOUR_FP8, "weight_type " + std::to_string(d.type) + " is not 0 to 3");
  require(d.out_type == TWOFOUR_FP16 || d.out_type == TWOFOUR_BF16,
          "out_type " + std::to_string(d.out_type) + " is not fp16 (0) or bf16 (1)");
  require(d.out_features > 0 && d.in_features > 0, "out_features and in_features are required");
  require(d.tactic >= 0 && d.tactic <= kTacticCount, "tactic " + std::to_string(d.tactic) + " is not 0 to " + std::to_string(kTacticCount));
  const auto n = static_cast<size_t>(d.out_features);
  require(d.channel_scales.empty() || d.channel_scales.size() == n, "channel_scales must hold out_features numbers");
  require(d.bias.empty() || d.bias.size() == 2 * n, "bias must hold out_features numbers of out_type");
}

// The SM and the version of the kernel's library that an algorithm is for.
Choice place_of(twofour_context* context, int kernel, int64_t tokens) {
  twofour_info info{};
  check(twofour_get_info(context, &info));
  Choice choice{kernel, info.sm, 0, 0, tokens, {}};
  check(twofour_library_version(static_cast<twofour_kernel>(kernel), &choice.version));
  return choice;
}

bool same_place(const Choice& a, const Choice& b) {
  return std::tie(a.kernel, a.sm, a.version, a.tokens) == std::tie(b.kernel, b.sm, b.version, b.tokens);
}

// Packing and its checks need no GPU.
Context host_context() {
  twofour_context* context = nullptr;
  check(twofour_create(TWOFOUR_HOST, &context));
  return Context(context, twofour_destroy);
}

}  // namespace

void check(twofour_status status) {
  if (status != TWOFOUR_OK) throw Error{twofour_last_error()};
}

int current_device() {
  if (on_host()) return TWOFOUR_HOST;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

Context make_context() {
  twofour_context* context = nullptr;
  check(twofour_create(current_device(), &context));
  return Context(context, twofour_destroy);
}

std::shared_ptr<Layer> Layer::from_dense(Description description, const void* weight) {
  validate(description);
  std::shared_ptr<Layer> layer(new Layer(std::move(description)));
  Description& d = layer->description_;
  const Context host = host_context();
  const twofour_gemm problem = layer->gemm(TWOFOUR_SKINNY, 1, nullptr);
  size_t bytes = 0;
  check(twofour_weight_bytes(host.get(), &problem, &bytes));
  d.packed.resize(bytes);
  check(twofour_prepare_weight(host.get(), &problem, weight, d.packed.data(), nullptr));
  check(twofour_get_stamp(host.get(), &problem, &d.stamp));
  return layer;
}

std::shared_ptr<Layer> Layer::from_packed(Description description) {
  validate(description);
  std::shared_ptr<Layer> layer(new Layer(std::move(description)));
  const Context host = host_context();
  const twofour_gemm problem = layer->gemm(TWOFOUR_SKINNY, 1, nullptr);
  check(twofour_check_stamp(host.get(), &problem, &layer->description_.stamp));
  size_t bytes = 0;
  check(twofour_weight_bytes(host.get(), &problem, &bytes));
  require(bytes == layer->description_.packed.size(), "the packed weight has " + std::to_string(layer->description_.packed.size()) +
                                                          " bytes, not " + std::to_string(bytes) + ": build the engine again");
  return layer;
}

Layer::~Layer() {
  for (auto& [device, forms] : forms_) {
    for (void* weight : forms.weights) release(device, weight);
    release(device, forms.channel_scales);
    release(device, forms.bias);
  }
}

twofour_kernel Layer::kernel(int tactic, int64_t tokens) {
  const Tactic& t = kTactics[std::clamp(tactic, 1, kTacticCount) - 1];
  return tokens <= t.skinny_tokens ? TWOFOUR_SKINNY : t.wide_kernel;
}

twofour_gemm Layer::gemm(int kernel, int64_t tokens, const Forms* forms) const {
  const Description& d = description_;
  twofour_gemm problem{};
  problem.kernel = kernel;
  problem.type = d.type;
  problem.out_type = d.out_type;
  problem.tokens = tokens;
  problem.out_features = d.out_features;
  problem.in_features = d.in_features;
  problem.scale = d.scale;
  if (forms != nullptr) {
    problem.channel_scales = static_cast<const float*>(forms->channel_scales);
    problem.bias = forms->bias;
  }
  return problem;
}

Layer::Forms& Layer::forms(int device) {
  const auto [place, made] = forms_.try_emplace(device);
  if (made) {
    const Description& d = description_;
    place->second.channel_scales = upload(device, d.channel_scales.data(), d.channel_scales.size() * sizeof(float));
    place->second.bias = upload(device, d.bias.data(), d.bias.size());
  }
  return place->second;
}

void Layer::make_weight(twofour_context* context, int device, Forms& forms, int kernel) {
  const Description& d = description_;
  if (forms.weights[kernel] != nullptr) return;
  if (kernel == TWOFOUR_SKINNY) {
    forms.weights[kernel] = upload(device, d.packed.data(), d.packed.size());
    return;
  }
  // From the packed form to dense, and from there to the form of this GPU and library version.
  const twofour_gemm skinny = gemm(TWOFOUR_SKINNY, 1, nullptr), wanted = gemm(kernel, 1, nullptr);
  size_t bytes = 0;
  check(twofour_weight_bytes(context, &wanted, &bytes));
  void* packed = upload(device, d.packed.data(), d.packed.size());
  void* dense = nullptr;
  void* prepared = nullptr;
  try {
    dense = allocate(device, static_cast<size_t>(d.out_features) * static_cast<size_t>(d.in_features) * element_bytes(d.type));
    check(twofour_unpack_weight(context, &skinny, packed, dense, nullptr));
    prepared = allocate(device, bytes);
    check(twofour_prepare_weight(context, &wanted, dense, prepared, nullptr));
    if (device != TWOFOUR_HOST) check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  } catch (...) {
    for (void* memory : {packed, dense, prepared}) release(device, memory);
    throw;
  }
  release(device, packed);
  release(device, dense);
  forms.weights[kernel] = prepared;
}

std::vector<int32_t> Layer::tactics(twofour_context* context) const {
  if (description_.tactic != 0) return {description_.tactic};
  bool runs[3];
  for (int kernel = 0; kernel < 3; ++kernel) {
    const twofour_gemm problem = gemm(kernel, kernel == TWOFOUR_SKINNY ? 1 : 128, nullptr);
    size_t bytes = 0;
    runs[kernel] = twofour_workspace_bytes(context, &problem, &bytes) == TWOFOUR_OK && bytes <= workspace_bytes(problem.tokens);
  }
  std::vector<int32_t> valid;
  for (int i = 0; i < kTacticCount; ++i)
    if (runs[kTactics[i].wide_kernel] && (kTactics[i].skinny_tokens == 0 || runs[TWOFOUR_SKINNY])) valid.push_back(i + 1);
  return valid;
}

size_t Layer::workspace_bytes(int64_t tokens) const {
  const Description& d = description_;
  const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  const size_t rows = (static_cast<size_t>(tokens) + 15) / 16 * 16;  // x and y as cuSPARSELt pads them
  const bool sums = d.type == TWOFOUR_INT8 || !d.channel_scales.empty();  // y may be 32-bit sums first
  return kLibraryWorkspace + aligned(rows * static_cast<size_t>(d.in_features) * element_bytes(d.type)) +
         aligned(rows * static_cast<size_t>(d.out_features) * (sums ? 4 : 2));
}

void Layer::prepare(twofour_context* context, int tactic, int64_t tokens) {
  const std::lock_guard<std::mutex> lock(mutex_);
  prepare_locked(context, tactic, tokens);
}

void Layer::prepare_locked(twofour_context* context, int tactic, int64_t tokens) {
  const int device = current_device();
  Forms& forms = this->forms(device);
  const twofour_kernel chosen = kernel(tactic, tokens);
  make_weight(context, device, forms, chosen);
  const twofour_gemm problem = gemm(chosen, tokens, &forms);
  check(twofour_plan(context, &problem));
  size_t needed = 0;
  check(twofour_workspace_bytes(context, &problem, &needed));
  require(needed <= workspace_bytes(tokens), "a kernel needs " + std::to_string(needed) + " bytes of workspace for " +
                                                 std::to_string(tokens) + " tokens, and the engine has " +
                                                 std::to_string(workspace_bytes(tokens)) + ": set another tactic");
}

void Layer::search(twofour_context* context, int64_t tokens) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int device = current_device();
  if (device == TWOFOUR_HOST) return;
  Forms& forms = this->forms(device);
  std::set<int> kernels;
  for (int32_t tactic : tactics(context)) kernels.insert(kernel(tactic, tokens));
  for (int kernel : kernels) search_kernel(context, device, forms, kernel, tokens);
}

// Layers of one shape share search results, also across the engines of one process.
void Layer::search_kernel(twofour_context* context, int device, Forms& forms, int kernel, int64_t tokens) {
  const Description& d = description_;
  Choice choice = place_of(context, kernel, tokens);
  for (const Choice& known : d.choices)
    if (same_place(known, choice)) return;
  using Key = std::tuple<int, int, int, int, int, bool, bool, int, int64_t>;
  static std::map<Key, twofour_algorithm> searched;
  static std::mutex searched_mutex;
  const std::lock_guard<std::mutex> lock(searched_mutex);
  const auto [place, fresh] = searched.try_emplace(Key{device, d.type, d.out_type, d.out_features, d.in_features,
                                                       d.channel_scales.empty(), d.bias.empty(), kernel, tokens});
  try {
    make_weight(context, device, forms, kernel);
    const twofour_gemm problem = gemm(kernel, tokens, &forms);
    if (fresh) {
      twofour_info info{};
      check(twofour_get_info(context, &info));
      const auto rows = static_cast<size_t>(tokens);
      const Scratch x(device, rows * static_cast<size_t>(d.in_features) * element_bytes(d.type));
      const Scratch y(device, rows * static_cast<size_t>(d.out_features) * element_bytes(d.out_type));
      const Scratch workspace(device, workspace_bytes(tokens)), flush(device, 2 * static_cast<size_t>(info.l2_bytes));
      check_cuda(cudaMemset(x.memory, 0x2A, x.bytes), "cudaMemset");  // a number other than 0 in every type
      twofour_search_result result{};
      check(twofour_search(context, &problem, x.memory, forms.weights[kernel], y.memory, workspace.memory,
                           workspace.bytes, flush.memory, flush.bytes, nullptr, &result));
      check(twofour_get_algorithm(context, &problem, &place->second));
    }
  } catch (...) {
    searched.erase(place);
    throw;
  }
  choice.algorithm = place->second;
  description_.choices.push_back(choice);
}

void Layer::warm_up(twofour_context* context, int tactic) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Choice& choice : description_.choices) {
    try {
      if (!same_place(choice, place_of(context, choice.kernel, choice.tokens))) continue;
      const twofour_gemm problem = gemm(choice.kernel, choice.tokens, nullptr);
      check(twofour_set_algorithm(context, &problem, &choice.algorithm));
      if (tactic != 0 && kernel(tactic, choice.tokens) == choice.kernel) prepare_locked(context, tactic, choice.tokens);
    } catch (const Error&) {
    }
  }
}

void Layer::enqueue(twofour_context* context, int tactic, int64_t tokens, const void* x, void* y, void* workspace,
                    void* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto place = forms_.find(current_device());
  const twofour_kernel chosen = kernel(tactic, tokens);
  require(place != forms_.end() && place->second.weights[chosen] != nullptr, "enqueue before onShapeChange");
  const twofour_gemm problem = gemm(chosen, tokens, &place->second);
  check(twofour_matmul(context, &problem, x, place->second.weights[chosen], y, workspace, workspace_bytes(tokens), stream));
}

}  // namespace twofour_tensorrt
