#include "plugin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

using namespace nvinfer1;

namespace twofour_tensorrt {

namespace {

std::mutex global_mutex;
ILoggerFinder* logger_finder = nullptr;

template <class T, class F>
T guard(T failure, F&& f) noexcept {
  try {
    return f();
  } catch (const Error& error) {
    log_error(error.message);
  } catch (const std::exception& error) {
    log_error(error.what());
  }
  return failure;
}

// One context for each execution context: streams of two of them may overlap, and each needs its own counters.
Context shared_context(const void* owner) {
  static std::map<std::pair<const void*, int>, std::weak_ptr<twofour_context>> contexts;
  const std::lock_guard<std::mutex> lock(global_mutex);
  std::weak_ptr<twofour_context>& slot = contexts[{owner, current_device()}];
  Context context = slot.lock();
  if (context == nullptr) slot = context = make_context();
  return context;
}

DataType data_type(int type) {
  constexpr DataType types[] = {DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kFP8};
  return types[type];
}

int64_t tokens_of(const Dims& dims) {
  int64_t tokens = 1;
  for (int i = 0; i + 1 < dims.nbDims; ++i) tokens *= dims.d[i];
  return tokens;
}

PluginField field(const char* name, const void* data, PluginFieldType type, size_t length) {
  return PluginField(name, data, type, static_cast<int32_t>(length));
}

// The fields of a weight: dense from a network's author, packed with its stamp from a serialized engine.
std::shared_ptr<Layer> make_layer(const PluginFieldCollection& fields) {
  Description d;
  const void* dense = nullptr;
  size_t dense_bytes = 0;
  const auto int32 = [](const PluginField& f) { return *static_cast<const int32_t*>(f.data); };
  for (int i = 0; i < fields.nbFields; ++i) {
    const PluginField& f = fields.fields[i];
    const std::string name = f.name;
    const auto* bytes = static_cast<const uint8_t*>(f.data);
    const auto length = static_cast<size_t>(f.length);
    if (f.data == nullptr || f.length < 1) continue;
    if (name == "weight") dense = f.data, dense_bytes = length;
    else if (name == "packed") d.packed.assign(bytes, bytes + length);
    else if (name == "choices" && length % sizeof(Choice) == 0) {
      d.choices.resize(length / sizeof(Choice));
      std::memcpy(d.choices.data(), f.data, length);
    } else if (name == "stamp" && length == sizeof d.stamp) std::memcpy(&d.stamp, f.data, length);
    else if (name == "weight_type") d.type = int32(f);
    else if (name == "out_type") d.out_type = int32(f);
    else if (name == "out_features") d.out_features = int32(f);
    else if (name == "in_features") d.in_features = int32(f);
    else if (name == "tactic") d.tactic = int32(f);
    else if (name == "scale") d.scale = *static_cast<const float*>(f.data);
    else if (name == "channel_scales") d.channel_scales.assign(static_cast<const float*>(f.data), static_cast<const float*>(f.data) + length);
    else if (name == "bias") d.bias.assign(bytes, bytes + length);
    else throw Error{"unknown or malformed plugin field '" + name + "'"};
  }
  if (!d.packed.empty()) return Layer::from_packed(std::move(d));
  const bool wide = d.type == TWOFOUR_FP16 || d.type == TWOFOUR_BF16;
  const size_t wanted = static_cast<size_t>(d.out_features) * static_cast<size_t>(d.in_features) * (wide ? 2 : 1);
  if (dense == nullptr || dense_bytes != wanted)
    throw Error{"weight has " + std::to_string(dense_bytes) + " bytes, not " + std::to_string(wanted) + " for [" +
                std::to_string(d.out_features) + ", " + std::to_string(d.in_features) + "]"};
  return Layer::from_dense(std::move(d), dense);
}

}  // namespace

void log_error(const std::string& message) {
  const std::string line = "twofour: " + message;
  ILogger* logger = nullptr;
  {
    const std::lock_guard<std::mutex> lock(global_mutex);
    if (logger_finder != nullptr) logger = logger_finder->findLogger();
  }
  if (logger != nullptr) logger->log(ILogger::Severity::kERROR, line.c_str());
  else std::fprintf(stderr, "%s\n", line.c_str());
}

void set_logger_finder(ILoggerFinder* finder) {
  const std::lock_guard<std::mutex> lock(global_mutex);
  logger_finder = finder;
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
  return guard<IPluginV3*>(nullptr, [&] {
    auto copy = std::make_unique<Plugin>(layer_);  // the weight is shared
    copy->context_ = context_;
    copy->tactic_ = tactic_;
    copy->tokens_ = tokens_;
    return copy.release();
  });
}

twofour_context* Plugin::context() const {
  static Context unattached;
  if (context_ != nullptr) return context_.get();
  if (unattached == nullptr) unattached = shared_context(nullptr);
  return unattached.get();
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                int32_t outputs) noexcept {
  return guard(1, [&] {
    if (inputs != 1 || outputs != 1) throw Error{"one input and one output"};
    const Dims& dims = in[0].desc.dims;
    const int64_t last = dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : 0;
    if (last != layer_->description().in_features)
      throw Error{"the input's last dimension is " + std::to_string(last) + ", the weight's in_features " +
                  std::to_string(layer_->description().in_features)};
    return 0;
  });
}

int32_t Plugin::getOutputDataTypes(DataType* out, int32_t outputs, const DataType*, int32_t) const noexcept {
  if (outputs != 1) return 1;
  out[0] = data_type(layer_->description().out_type);
  return 0;
}

int32_t Plugin::getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                                int32_t outputs, IExprBuilder& builder) noexcept {
  if (inputs != 1 || outputs != 1 || in[0].nbDims < 1) return 1;
  out[0] = in[0];
  out[0].d[in[0].nbDims - 1] = builder.constant(layer_->description().out_features);
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                       int32_t outputs) noexcept {
  if (inputs != 1 || outputs != 1 || position < 0 || position > 1) return false;
  const Description& d = layer_->description();
  const PluginTensorDesc& desc = tensors[position].desc;
  return desc.format == TensorFormat::kLINEAR && desc.type == data_type(position == 0 ? d.type : d.out_type);
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                                int32_t) const noexcept {
  return guard<size_t>(0, [&] { return layer_->workspace_bytes(tokens_of(in[0].max)); });
}

int32_t Plugin::getNbTactics() noexcept {
  return guard(0, [&] { return static_cast<int32_t>(layer_->tactics(context()).size()); });
}

int32_t Plugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  return guard(1, [&] {
    const std::vector<int32_t> valid = layer_->tactics(context());
    if (static_cast<size_t>(count) != valid.size()) throw Error{"TensorRT requests other tactics than getNbTactics returned"};
    std::copy(valid.begin(), valid.end(), tactics);
    return 0;
  });
}

// Times hold for one shape, one set of tactics and one version of each library.
const char* Plugin::getTimingCacheID() noexcept {
  std::call_once(id_once_, [&] {
    const Description& d = layer_->description();
    id_ = "type" + std::to_string(d.type) + "_out" + std::to_string(d.out_type) + "_n" + std::to_string(d.out_features) +
          "_k" + std::to_string(d.in_features) + "_scales" + std::to_string(d.channel_scales.empty() ? 0 : 1) + "_bias" +
          std::to_string(d.bias.empty() ? 0 : 1) + "_tactic" + std::to_string(d.tactic) + "_twofour" +
          std::to_string(twofour_version());
    for (const auto& [name, kernel] : {std::pair("_layout", TWOFOUR_SKINNY), std::pair("_cusparselt", TWOFOUR_CUSPARSELT),
                                       std::pair("_cublaslt", TWOFOUR_CUBLASLT)}) {
      int32_t version = 0;  // where the library is missing
      if (twofour_library_version(kernel, &version) != TWOFOUR_OK) version = 0;
      id_ += name + std::to_string(version);
    }
  });
  return id_.c_str();
}

// TensorRT may set a tactic before or after it sets the shape: the second call prepares.
int32_t Plugin::setTactic(int32_t tactic) noexcept {
  if (tactic < 0 || tactic > kTacticCount) return 1;
  return guard(1, [&] {
    tactic_ = tactic;
    if (tokens_ > 0) layer_->prepare(context(), tactic_, tokens_);
    return 0;
  });
}

// Unattached, the builder is about to time the tactics on this shape: each is made ready, with the fastest algorithm.
int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*, int32_t) noexcept {
  return guard(1, [&] {
    tokens_ = tokens_of(in[0].dims);
    if (tokens_ == 0) return 0;
    if (context_ == nullptr) {
      try {
        layer_->search(context(), tokens_);
      } catch (const Error& error) {
        log_error(error.message + "; it runs with its default algorithm");
      }
      for (int32_t tactic : layer_->tactics(context())) layer_->prepare(context(), tactic, tokens_);
    }
    layer_->prepare(context(), tactic_, tokens_);
    return 0;
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* x, void* const* y,
                        void* workspace, cudaStream_t stream) noexcept {
  return guard(1, [&] {
    const int64_t tokens = tokens_of(in[0].dims);
    if (tokens == 0) return 0;
    layer_->enqueue(context(), tactic_, tokens, x[0], y[0], workspace, stream);
    return 0;
  });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext* resources) noexcept {
  return guard<IPluginV3*>(nullptr, [&] {
    auto copy = std::make_unique<Plugin>(layer_);
    copy->tactic_ = tactic_;
    copy->context_ = shared_context(resources);
    layer_->warm_up(copy->context(), tactic_);
    return copy.release();
  });
}

const PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  const Description& d = layer_->description();
  fields_ = {field("weight_type", &d.type, PluginFieldType::kINT32, 1),
             field("out_type", &d.out_type, PluginFieldType::kINT32, 1),
             field("out_features", &d.out_features, PluginFieldType::kINT32, 1),
             field("in_features", &d.in_features, PluginFieldType::kINT32, 1),
             field("scale", &d.scale, PluginFieldType::kFLOAT32, 1),
             field("tactic", &d.tactic, PluginFieldType::kINT32, 1),
             field("packed", d.packed.data(), PluginFieldType::kUNKNOWN, d.packed.size()),
             field("stamp", &d.stamp, PluginFieldType::kUNKNOWN, sizeof d.stamp)};
  if (!d.choices.empty())
    fields_.push_back(field("choices", d.choices.data(), PluginFieldType::kUNKNOWN, d.choices.size() * sizeof(Choice)));
  if (!d.channel_scales.empty())
    fields_.push_back(field("channel_scales", d.channel_scales.data(), PluginFieldType::kFLOAT32, d.channel_scales.size()));
  if (!d.bias.empty()) fields_.push_back(field("bias", d.bias.data(), PluginFieldType::kUNKNOWN, d.bias.size()));
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

Creator::Creator() {
  for (const char* name : {"weight_type", "out_type", "out_features", "in_features", "tactic"})
    fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
  fields_.emplace_back("scale", nullptr, PluginFieldType::kFLOAT32, 1);
  fields_.emplace_back("channel_scales", nullptr, PluginFieldType::kFLOAT32, 0);
  for (const char* name : {"weight", "bias"}) fields_.emplace_back(name, nullptr, PluginFieldType::kUNKNOWN, 0);
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

IPluginV3* Creator::createPlugin(const char* name, const PluginFieldCollection* fields, TensorRTPhase) noexcept {
  return guard<IPluginV3*>(nullptr, [&]() -> IPluginV3* {
    if (fields == nullptr) throw Error{"no fields"};
    try {
      return new Plugin(make_layer(*fields));
    } catch (const Error& error) {
      throw Error{std::string("layer '") + (name != nullptr ? name : "") + "': " + error.message};
    }
  });
}

}  // namespace twofour_tensorrt
