// Drives the plugin through TensorRT's interfaces without TensorRT: harness PLUGIN runs every check, harness --open BINDING
// prints how many creators are registered after that library made a runtime. Exit status 0 where all is well.
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

void check_creator(IPluginCreatorV3One& creator) {
  REQUIRE(!std::strcmp(creator.getPluginName(), "TwofourGemm") && !std::strcmp(creator.getPluginVersion(), "1"));
  REQUIRE(!std::strcmp(creator.getPluginNamespace(), "twofour"));
  bool weight = false;
  for (int i = 0; i < creator.getFieldNames()->nbFields; ++i)
    weight = weight || !std::strcmp(creator.getFieldNames()->fields[i].name, "weight");
  REQUIRE(weight);
}

void check_build(IPluginCreatorV3One& creator) {
  Problem problem;
  Handle handle = create(creator, problem.fields());
  REQUIRE(handle.plugin != nullptr && handle.core != nullptr && handle.build != nullptr && handle.runtime != nullptr);
  REQUIRE(!std::strcmp(handle.core->getPluginName(), "TwofourGemm") && handle.build->getNbOutputs() == 1);

  DataType in_type = DataType::kINT8, out_type{};
  REQUIRE(handle.build->getOutputDataTypes(&out_type, 1, &in_type, 1) == 0 && out_type == DataType::kHALF);

  Expressions expressions;
  DimsExprs in{}, out{};
  in.nbDims = 3;
  for (int i = 0; i < 3; ++i) in.d[i] = expressions.constant(i == 2 ? kK : -1);
  REQUIRE(handle.build->getOutputShapes(&in, 1, nullptr, 0, &out, 1, expressions) == 0);
  REQUIRE(out.nbDims == 3 && out.d[0] == in.d[0] && out.d[1] == in.d[1] && out.d[2]->getConstantValue() == kN);

  DynamicPluginTensorDesc tensors[2]{};
  const auto supports = [&](int position, DataType type, TensorFormat format) {
    tensors[position].desc.type = type;
    tensors[position].desc.format = format;
    return handle.build->supportsFormatCombination(position, tensors, 1, 1);
  };
  REQUIRE(supports(0, DataType::kINT8, TensorFormat::kLINEAR) && supports(1, DataType::kHALF, TensorFormat::kLINEAR));
  REQUIRE(!supports(0, DataType::kHALF, TensorFormat::kLINEAR) && !supports(1, DataType::kFLOAT, TensorFormat::kLINEAR));
  REQUIRE(!supports(0, DataType::kINT8, TensorFormat::kCHW32));

  // What is asked for at the most tokens must do for any fewer: x and y padded, the sums in 32 bits, the libraries' own.
  size_t before = 0;
  for (int64_t tokens : {1, 8, 9, 100, 101, 4096}) {
    tensors[0].max = tensor({tokens, kK}, DataType::kINT8).dims;
    const size_t bytes = handle.build->getWorkspaceSize(&tensors[0], 1, &tensors[1], 1);
    REQUIRE(bytes >= before && bytes >= (size_t{32} << 20) + static_cast<size_t>(tokens) * (kK + 4 * kN));
    before = bytes;
  }

  tensors[0].desc = tensor({-1, kK + 4}, DataType::kINT8);
  REQUIRE(handle.build->configurePlugin(&tensors[0], 1, &tensors[1], 1) != 0);
  REQUIRE(logged.find("last dimension is 324, the weight's in_features 320") != std::string::npos);
  const std::string id = handle.build->getTimingCacheID();
  for (const char* part : {"n96_k320", "_tactic0", "_layout1", "_cusparselt", "_cublaslt"})
    REQUIRE(id.find(part) != std::string::npos);
  REQUIRE(on_host() || id.find("_cusparselt0") == std::string::npos);

  REQUIRE(handle.runtime->setTactic(99) != 0 && handle.runtime->setTactic(0) == 0);
  problem.tactic = 4;
  Handle pinned = create(creator, problem.fields());
  int32_t tactic = 0;
  REQUIRE(pinned.build->getNbTactics() == 1 && pinned.build->getValidTactics(&tactic, 1) == 0 && tactic == 4);
}

// Every tactic on every side of its limits, from one stored weight: packed, compressed and dense.
void check_tactics(IPluginCreatorV3One& creator, const Problem& problem) {
  Handle handle = create(creator, problem.fields());
  std::vector<int32_t> valid(static_cast<size_t>(handle.build->getNbTactics()));
  REQUIRE(valid.size() == 6 && handle.build->getValidTactics(valid.data(), 6) == 0);
  for (int32_t tactic : valid) {
    REQUIRE(handle.runtime->setTactic(tactic) == 0);
    for (int64_t tokens : {1, 16, 17, 64, 65, 100, 129}) check_values(handle, problem, tokens);
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

// The builder gives the shape once and then times each tactic; a context may set its tactic late too. What the search
// found goes into the engine.
void check_tactic_after_shape(IPluginCreatorV3One& creator, const Problem& problem) {
  Handle builder = create(creator, problem.fields());
  REQUIRE(!serializes(builder, "choices"));
  Resources resources;
  for (int64_t tokens : {16, 129}) {
    check_values(builder, problem, tokens);
    Handle context(builder.runtime->attachToContext(&resources));
    check_values(context, problem, tokens);
    for (int32_t tactic : {4, 1, 6, 3, 2, 5}) {
      REQUIRE(builder.runtime->setTactic(tactic) == 0 && context.runtime->setTactic(tactic) == 0);
      check_values(builder, problem, tokens, true);
      check_values(context, problem, tokens, true);
    }
  }
  REQUIRE(serializes(builder, "choices"));
  Handle loaded = deserialize(creator, builder);
  REQUIRE(serializes(loaded, "choices"));
  REQUIRE(loaded.runtime->setTactic(2) == 0);
  Handle running(loaded.runtime->attachToContext(&resources));
  check_values(running, problem, 16);
  check_values(running, problem, 129);
}

void check_run(IPluginCreatorV3One& creator) {
  const Problem problem;
  auto handle = std::make_unique<Handle>(create(creator, problem.fields()));
  Resources first, second;
  Handle one(handle->runtime->attachToContext(&first)), other(handle->runtime->attachToContext(&second));
  Handle copy(handle->plugin->clone());
  for (int64_t tokens : {1, 7, 16, 64}) check_values(*handle, problem, tokens);
  handle.reset();  // the weight lives on in the others
  check_values(one, problem, 8);
  check_values(other, problem, 9);
  check_values(copy, problem, 10);

  Problem longer;
  longer.x.resize(129 * kK, 3);
  if (on_host()) {
    std::vector<uint16_t> y;
    REQUIRE(run(one, longer, 65, y) != 0 && logged.find("cusparselt runs on a GPU only") != std::string::npos);
  } else {
    check_tactics(creator, longer);
    check_tactic_after_shape(creator, longer);
  }

  Handle fresh = create(creator, problem.fields());
  const PluginTensorDesc in = tensor({1, kK}, DataType::kINT8), out = tensor({1, kN}, DataType::kHALF);
  const void* inputs[] = {problem.x.data()};
  void* outputs[] = {nullptr};
  REQUIRE(fresh.runtime->enqueue(&in, &out, inputs, outputs, nullptr, nullptr) != 0);
  REQUIRE(logged.find("enqueue before onShapeChange") != std::string::npos);
}

void check_serialization(IPluginCreatorV3One& creator) {
  const Problem problem;
  Handle built = create(creator, problem.fields());
  Handle loaded = deserialize(creator, built);
  REQUIRE(loaded.plugin != nullptr);
  std::vector<uint16_t> before, after;
  REQUIRE(run(built, problem, 5, before) == 0 && run(loaded, problem, 5, after) == 0 && before == after);
  Handle again = deserialize(creator, loaded);  // an engine read and written once more
  check_values(again, problem, 3);
  REQUIRE(deserialize(creator, built, true).plugin == nullptr);
  REQUIRE(logged.find("layer 'mlp.up_proj'") != std::string::npos && logged.find("prepare it again") != std::string::npos);
}

void check_bad_fields(IPluginCreatorV3One& creator) {
  const auto refused = [&](const Problem& problem, const char* words, std::vector<PluginField> more = {}) {
    std::vector<PluginField> fields = problem.fields();
    fields.insert(fields.end(), more.begin(), more.end());
    REQUIRE(create(creator, fields).plugin == nullptr && logged.find(words) != std::string::npos);
  };
  Problem dense;
  for (int i = 0; i < 3; ++i) dense.weight[static_cast<size_t>(2 * kK + 8 + i)] = 1;
  refused(dense, "row 2, group 2 (inputs 8 to 11) has more than 2 nonzeros");
  Problem short_weight;
  short_weight.weight.resize(100);
  refused(short_weight, "weight has 100 bytes, wanted 30720 for [96, 320]");
  Problem misaligned;
  misaligned.k = 316, misaligned.weight.resize(static_cast<size_t>(kN) * 316);
  refused(misaligned, "in_features=316 is not a multiple of 16");
  Problem type;
  type.type = 7;
  refused(type, "weight_type 7 is not 0 to 3");
  Problem tactic;
  tactic.tactic = 9;
  refused(tactic, "tactic 9 is not 0 to 6");
  const float number = 1;
  refused(Problem(), "unknown or malformed plugin field 'alpha'", {{"alpha", &number, PluginFieldType::kFLOAT32, 1}});
  const uint8_t bias[4] = {};
  refused(Problem(), "bias must hold out_features numbers", {{"bias", bias, PluginFieldType::kUNKNOWN, 4}});
}

int open_binding(const char* path) {
  void* binding = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (binding == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  std::printf("%d\n", reinterpret_cast<int (*)()>(dlsym(binding, "count_creators"))());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && !std::strcmp(arguments[1], "--open")) return open_binding(arguments[2]);
  if (count != 2) return std::fprintf(stderr, "harness PLUGIN | harness --open BINDING\n"), 2;
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  REQUIRE(creators != nullptr && set_finder != nullptr);
  set_finder(&finder);
  int32_t number = 0;
  auto& creator = *static_cast<IPluginCreatorV3One*>(creators(number)[0]);
  REQUIRE(number == 1);
  check_creator(creator);
  check_build(creator);
  check_run(creator);
  check_serialization(creator);
  check_bad_fields(creator);
  std::printf("all checks passed\n");
  return 0;
}
