// Stands in for libnvinfer in the harness: a registry that remembers creators, and the function that makes a runtime.
#include <NvInfer.h>

#include <vector>

using namespace nvinfer1;

namespace {

class Registry final : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreatorInterface& creator, const char*) noexcept override {
    creators.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = static_cast<int32_t>(creators.size());
    return creators.data();
  }
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override { return getAllCreators(count); }

 private:
  std::vector<IPluginCreatorInterface*> creators;
};

}  // namespace

extern "C" TENSORRTAPI IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}

extern "C" TENSORRTAPI void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept { return logger; }
