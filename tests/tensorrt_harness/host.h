// The part of TensorRT: it makes plugins, gives them shapes and memory, runs them and serializes them.
#pragma once

#include <NvInfer.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string logged;

#define REQUIRE(condition)                                                                      \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      std::fprintf(stderr, "line %d: %s (logged: %s)\n", __LINE__, #condition, logged.c_str()); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (false)

struct Logger final : ILogger {
  void log(Severity, const char* message) noexcept override { logged = message; }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

struct Constant final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Constant(int64_t v) : value(v) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  int64_t value;
};

struct Expressions final : IExprBuilder, apiv::VExprBuilder {
  Expressions() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override {
    made.push_back(std::make_unique<Constant>(value));
    return made.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
  std::vector<std::unique_ptr<Constant>> made;
};

struct Resources final : IPluginResourceContext {
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// A plugin with its three interfaces.
struct Handle {
  explicit Handle(IPluginV3* p) : plugin(p) {
    if (p == nullptr) return;
    core = static_cast<IPluginV3OneCore*>(p->getCapabilityInterface(PluginCapabilityType::kCORE));
    build = static_cast<IPluginV3OneBuild*>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime = static_cast<IPluginV3OneRuntime*>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneCore* core = nullptr;
  IPluginV3OneBuild* build = nullptr;
  IPluginV3OneRuntime* runtime = nullptr;
};

constexpr int32_t kN = 96, kK = 320, kInt8 = 2, kFp16 = 0;

// An int8 layer and its input; every group of 4 holds 0 to 2 nonzeros.
struct Problem {
  std::vector<int8_t> weight = std::vector<int8_t>(kN * kK), x = std::vector<int8_t>(64 * kK);
  std::vector<float> scales = std::vector<float>(kN);
  int32_t n = kN, k = kK, type = kInt8, out = kFp16, tactic = 0;

  Problem() {
    std::mt19937 random(3);
    for (size_t group = 0; group < weight.size() / 4; ++group)
      for (int i = 0; i < 2; ++i) weight[4 * group + random() % 4] = static_cast<int8_t>(random());
    for (int8_t& value : x) value = static_cast<int8_t>(random());
    for (float& scale : scales) scale = 1e-4f * static_cast<float>(1 + random() % 7);
  }

  std::vector<PluginField> fields() const {
    return {{"weight", weight.data(), PluginFieldType::kUNKNOWN, static_cast<int32_t>(weight.size())},
            {"weight_type", &type, PluginFieldType::kINT32, 1},
            {"out_type", &out, PluginFieldType::kINT32, 1},
            {"out_features", &n, PluginFieldType::kINT32, 1},
            {"in_features", &k, PluginFieldType::kINT32, 1},
            {"tactic", &tactic, PluginFieldType::kINT32, 1},
            {"channel_scales", scales.data(), PluginFieldType::kFLOAT32, kN}};
  }

  float expected(int token, int feature) const {
    int64_t sum = 0;
    for (int i = 0; i < kK; ++i) sum += int64_t{x[static_cast<size_t>(token * kK + i)]} * weight[static_cast<size_t>(feature * kK + i)];
    return static_cast<float>(sum) * scales[static_cast<size_t>(feature)];
  }
};

float half_to_float(uint16_t h) {  // finite normals and zero, which is all that comes here
  const int exponent = h >> 10 & 31;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(h & 1023), -24)
                                        : std::ldexp(static_cast<float>(1024 + (h & 1023)), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

Handle create(IPluginCreatorV3One& creator, const std::vector<PluginField>& fields, TensorRTPhase phase = TensorRTPhase::kBUILD) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  logged.clear();
  return Handle(creator.createPlugin("mlp.up_proj", &collection, phase));
}

PluginTensorDesc tensor(std::vector<int64_t> dims, DataType type) {
  PluginTensorDesc desc{};
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  desc.dims.nbDims = static_cast<int32_t>(dims.size());
  std::memcpy(desc.dims.d, dims.data(), dims.size() * sizeof(int64_t));
  return desc;
}

bool on_host() {
  const char* device = std::getenv("TWOFOUR_PLUGIN_DEVICE");
  return device != nullptr && !std::strcmp(device, "host");
}

// Runs x[2, tokens / 2, K] (or [tokens, K]) through the plugin; returns enqueue's status. `shaped`: it knows the shape.
int32_t run(Handle& handle, const Problem& problem, int64_t tokens, std::vector<uint16_t>& y, bool shaped = false) {
  const auto shape = [&](int64_t last) {
    return tokens % 2 == 0 ? std::vector<int64_t>{2, tokens / 2, last} : std::vector<int64_t>{tokens, last};
  };
  const PluginTensorDesc in = tensor(shape(kK), DataType::kINT8), out = tensor(shape(kN), DataType::kHALF);
  DynamicPluginTensorDesc dynamic[2]{};
  dynamic[0] = {in, in.dims, in.dims, in.dims};
  dynamic[1] = {out, out.dims, out.dims, out.dims};
  REQUIRE(handle.build->configurePlugin(&dynamic[0], 1, &dynamic[1], 1) == 0);
  const size_t bytes = handle.build->getWorkspaceSize(&dynamic[0], 1, &dynamic[1], 1);
  const auto align = [](size_t n) { return (n + 255) / 256 * 256; };
  std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, align(bytes + 1)), &std::free);
  std::unique_ptr<void, decltype(&std::free)> x(std::aligned_alloc(256, align(problem.x.size())), &std::free);
  std::unique_ptr<void, decltype(&std::free)> result(std::aligned_alloc(256, align(static_cast<size_t>(tokens * kN * 2))), &std::free);
  std::memcpy(x.get(), problem.x.data(), problem.x.size());
  const void* inputs[] = {x.get()};
  void* outputs[] = {result.get()};
  if (!shaped && handle.runtime->onShapeChange(&in, 1, &out, 1) != 0) return -1;
  auto* const behind = static_cast<uint8_t*>(workspace.get()) + bytes;  // what lies there is not the plugin's
  *behind = 0x5A;
  const int32_t status = handle.runtime->enqueue(&in, &out, inputs, outputs, workspace.get(), nullptr);
  REQUIRE(*behind == 0x5A);
  y.assign(static_cast<uint16_t*>(result.get()), static_cast<uint16_t*>(result.get()) + tokens * kN);
  return status;
}

void check_values(Handle& handle, const Problem& problem, int64_t tokens, bool shaped = false) {
  std::vector<uint16_t> y;
  REQUIRE(run(handle, problem, tokens, y, shaped) == 0);
  for (int token = 0; token < tokens; ++token)
    for (int feature = 0; feature < kN; ++feature) {
      const float got = half_to_float(y[static_cast<size_t>(token * kN + feature)]), wanted = problem.expected(token, feature);
      REQUIRE(std::fabs(got - wanted) <= std::fabs(wanted) * 4.9e-4f + 6e-8f);  // half a unit in the last place of fp16
    }
}

// Serializes as TensorRT does: by value. `break_stamp` changes the version in the stamp.
Handle deserialize(IPluginCreatorV3One& creator, Handle& source, bool break_stamp = false) {
  std::vector<std::vector<char>> memory;
  std::vector<std::string> names;
  std::vector<PluginField> fields;
  const PluginFieldCollection* collection = source.runtime->getFieldsToSerialize();
  for (int i = 0; i < collection->nbFields; ++i) {
    const PluginField& f = collection->fields[i];
    const bool four = f.type == PluginFieldType::kINT32 || f.type == PluginFieldType::kFLOAT32;
    const auto* bytes = static_cast<const char*>(f.data);
    memory.emplace_back(bytes, bytes + static_cast<size_t>(f.length) * (four ? 4 : 1));
    names.emplace_back(f.name);
    if (break_stamp && names.back() == "stamp") memory.back().back() ^= 0x40;  // the version's highest byte
  }
  for (int i = 0; i < collection->nbFields; ++i)
    fields.emplace_back(names[static_cast<size_t>(i)].c_str(), memory[static_cast<size_t>(i)].data(), collection->fields[i].type,
                        collection->fields[i].length);
  return create(creator, fields, TensorRTPhase::kRUNTIME);
}

bool serializes(Handle& handle, const char* name) {
  const PluginFieldCollection* fields = handle.runtime->getFieldsToSerialize();
  bool there = false;
  for (int i = 0; i < fields->nbFields; ++i) there = there || !std::strcmp(fields->fields[i].name, name);
  return there;
}

}  // namespace
