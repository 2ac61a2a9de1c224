// Drives the plugin through TensorRT's interfaces without TensorRT: harness PLUGIN runs every check, harness --open BINDING
// prints how many creators are registered after that library made a runtime. Exit status 0 where all is well.
#include "host.h"

namespace {

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
  refused(short_weight, "weight has 100 bytes, not 30720 for [96, 320]");
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
