// Registers the creator with TensorRT: through the functions that IPluginRegistry::loadLibrary looks up, or, where the
// library is preloaded (LD_PRELOAD), by itself: at once if TensorRT is loaded, else when the process makes its first
// runtime or builder, since the library interposes the two functions that make them. Python loads TensorRT late.
#pragma GCC visibility push(default)  // TensorRT's headers leave the visibility of what is defined below to the flags
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "plugin.h"

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginRegistry;

namespace {

IPluginCreatorInterface& creator() {
  static twofour_tensorrt::Creator instance;
  return instance;
}

// A function of libnvinfer, which may be loaded with local symbols.
template <class Function>
Function find(const char* name) {
  void* symbol = dlsym(RTLD_NEXT, name);
  if (symbol == nullptr) {
    const std::string library = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);  // only if it is loaded already
    if (handle != nullptr) symbol = dlsym(handle, name);
  }
  return reinterpret_cast<Function>(symbol);
}

bool register_creator() {
  static std::mutex mutex;
  static bool done = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done) return true;
  auto registry = find<IPluginRegistry* (*)()>("getPluginRegistry");
  if (registry == nullptr) registry = reinterpret_cast<decltype(registry)>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
  if (registry != nullptr && registry() != nullptr)
    done = registry()->registerCreator(creator(), twofour_tensorrt::kNamespace);
  return done;
}

// Only where preloaded: IPluginRegistry::loadLibrary registers the creator itself, which must happen once.
__attribute__((constructor)) void on_load() {
  const char* preload = std::getenv("LD_PRELOAD");
  if (preload != nullptr && std::strstr(preload, "libtwofour_tensorrt") != nullptr) register_creator();
}

template <class... Arguments>
void* forward(const char* name, Arguments... arguments) {
  register_creator();
  const auto real = find<void* (*)(Arguments...)>(name);
  if (real == nullptr) {
    twofour_tensorrt::log_error(std::string("no ") + name + " in this process: load libnvinfer first");
    return nullptr;
  }
  return real(arguments...);
}

}  // namespace

extern "C" {

// For a program that opens the library itself, as with TensorRT-LLM's own plugins. Returns whether the creator is registered.
TENSORRTAPI bool initTwofourPlugins() { return register_creator(); }

TENSORRTAPI IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static IPluginCreatorInterface* const creators[] = {&creator()};
  count = 1;
  return creators;
}

TENSORRTAPI void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { twofour_tensorrt::set_logger_finder(finder); }

TENSORRTAPI void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  return forward("createInferRuntime_INTERNAL", logger, version);
}

TENSORRTAPI void* createInferBuilder_INTERNAL(void* logger, int32_t version) noexcept {
  return forward("createInferBuilder_INTERNAL", logger, version);
}

}  // extern "C"
