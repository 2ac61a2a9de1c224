#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace twofour {

namespace {
thread_local std::string message;
}

void fail(twofour_status status, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{status, text};
}

void set_last_error(const std::string& text) { message = text; }
const char* last_error() { return message.c_str(); }

const char* status_name(twofour_status status) {
  switch (status) {
    case TWOFOUR_OK: return "ok";
    case TWOFOUR_INVALID_ARGUMENT: return "invalid argument";
    case TWOFOUR_NOT_2_4: return "not 2:4";
    case TWOFOUR_MISALIGNED: return "misaligned";
    case TWOFOUR_NO_GPU: return "no GPU";
    case TWOFOUR_SM_UNSUPPORTED: return "SM unsupported";
    case TWOFOUR_LIBRARY_MISSING: return "library missing";
    case TWOFOUR_LIBRARY_TOO_OLD: return "library too old";
    case TWOFOUR_WRONG_BUILD: return "wrong build";
    case TWOFOUR_OUT_OF_MEMORY: return "out of memory";
    case TWOFOUR_WORKSPACE_TOO_SMALL: return "workspace too small";
    case TWOFOUR_NOT_PLANNED: return "not planned";
    case TWOFOUR_UNSUPPORTED: return "unsupported";
    case TWOFOUR_CUDA_ERROR: return "CUDA error";
    case TWOFOUR_CUSPARSELT_ERROR: return "cuSPARSELt error";
    case TWOFOUR_CUBLASLT_ERROR: return "cuBLASLt error";
  }
  return "unknown status";
}

const char* type_name(int type) {
  static const char* const names[] = {"fp16", "bf16", "int8", "fp8"};
  return type >= 0 && type < 4 ? names[type] : "unknown type";
}

const char* kernel_name(int kernel) {
  static const char* const names[] = {"skinny", "cusparselt", "cublaslt", "skinny-4of8", "skinny-5of8", "skinny-6of8",
                                      "hybrid", "hybrid-4of8"};
  return kernel >= 0 && kernel < 8 ? names[kernel] : "unknown kernel";
}

}  // namespace twofour
