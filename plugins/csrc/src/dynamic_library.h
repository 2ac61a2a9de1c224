// Libraries loaded at run time, so that libtwofour loads on every machine and reports a missing library itself.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <initializer_list>
#include <string>

#include "status.h"

namespace twofour {

class DynamicLibrary {
 public:
  // Tries the file that the environment variable names, else the names in turn (one already loaded is reused).
  DynamicLibrary(const char* variable, std::initializer_list<const char*> names, const char* advice) {
    std::string reason;
    const char* const chosen = std::getenv(variable);
    const auto open = [&](const char* name) {
      handle_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (handle_ == nullptr) reason = dlerror();
      return handle_ != nullptr;
    };
    if (chosen != nullptr) {
      open(chosen);
    } else {
      for (const char* name : names)
        if (open(name)) break;
    }
    if (handle_ == nullptr) fail(TWOFOUR_LIBRARY_MISSING, "%s; %s, or set %s", reason.c_str(), advice, variable);
  }
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;
  // Never closed: CUDA libraries do not survive being unloaded.

  template <class Function>
  void find(const char* name, Function& function) const {
    function = reinterpret_cast<Function>(dlsym(handle_, name));
    if (function == nullptr) fail(TWOFOUR_LIBRARY_TOO_OLD, "%s: install a newer version", dlerror());
  }

 private:
  void* handle_ = nullptr;
};

}  // namespace twofour
