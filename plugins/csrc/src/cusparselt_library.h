// The functions of cuSPARSELt, resolved when the first is called.
#pragma once

#include <cusparseLt.h>

#include <cstdlib>

#include "cusparselt.h"
#include "dynamic_library.h"
#include "status.h"

namespace twofour {
namespace {

// The functions used, under their own names.
#define TWOFOUR_CUSPARSELT_FUNCTIONS(F)                                                                              \
  F(cusparseLtInit) F(cusparseLtDestroy) F(cusparseLtGetProperty) F(cusparseLtGetErrorString)                        \
  F(cusparseLtDenseDescriptorInit) F(cusparseLtStructuredDescriptorInit) F(cusparseLtMatDescriptorDestroy)           \
  F(cusparseLtMatmulDescriptorInit) F(cusparseLtMatmulDescSetAttribute) F(cusparseLtMatmulAlgSelectionInit)          \
  F(cusparseLtMatmulAlgSelectionDestroy) F(cusparseLtMatmulAlgSetAttribute) F(cusparseLtMatmulAlgGetAttribute)       \
  F(cusparseLtMatmulGetWorkspace) F(cusparseLtMatmulPlanInit) F(cusparseLtMatmulPlanDestroy) F(cusparseLtMatmul)     \
  F(cusparseLtSpMMACompressedSize2) F(cusparseLtSpMMACompress2)

// For measuring alone: results made with an older version name it, and no engine that ships is built with it.
int oldest_cusparselt() {
  const char* const accepted = std::getenv("TWOFOUR_CUSPARSELT_OLDEST");
  return accepted != nullptr ? std::atoi(accepted) : kOldestCusparselt;
}

struct Library {
#define TWOFOUR_DECLARE(name) decltype(&::name) name;
  TWOFOUR_CUSPARSELT_FUNCTIONS(TWOFOUR_DECLARE)
#undef TWOFOUR_DECLARE
  int version = 0;

  Library() {
    const DynamicLibrary library("TWOFOUR_CUSPARSELT", {"libcusparseLt.so.0", "libcusparseLt.so"},
                                 "pip install nvidia-cusparselt-cu13");
#define TWOFOUR_FIND(name) library.find(#name, name);
    TWOFOUR_CUSPARSELT_FUNCTIONS(TWOFOUR_FIND)
#undef TWOFOUR_FIND
    int major = 0, minor = 0, patch = 0;
    if (cusparseLtGetProperty(MAJOR_VERSION, &major) != CUSPARSE_STATUS_SUCCESS ||
        cusparseLtGetProperty(MINOR_VERSION, &minor) != CUSPARSE_STATUS_SUCCESS ||
        cusparseLtGetProperty(PATCH_LEVEL, &patch) != CUSPARSE_STATUS_SUCCESS)
      fail(TWOFOUR_CUSPARSELT_ERROR, "cusparseLtGetProperty does not return the version of cuSPARSELt");
    version = 1000 * major + 100 * minor + patch;
    if (version < oldest_cusparselt())
      fail(TWOFOUR_LIBRARY_TOO_OLD,
           "cuSPARSELt %d.%d.%d is too old: 0.8.0 is slow on H100 and L4; pip install 'nvidia-cusparselt-cu13>=0.8.1'",
           major, minor, patch);
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

void check(cusparseStatus_t status, const char* call) {
  if (status == CUSPARSE_STATUS_SUCCESS) return;
  const twofour_status code = status == CUSPARSE_STATUS_NOT_SUPPORTED   ? TWOFOUR_UNSUPPORTED
                              : status == CUSPARSE_STATUS_ARCH_MISMATCH ? TWOFOUR_SM_UNSUPPORTED
                              : status == CUSPARSE_STATUS_ALLOC_FAILED  ? TWOFOUR_OUT_OF_MEMORY
                                                                        : TWOFOUR_CUSPARSELT_ERROR;
  fail(code, "%s: %s (%d)", call, library().cusparseLtGetErrorString(status), static_cast<int>(status));
}

#define TWOFOUR_CALL(name, ...) check(library().name(__VA_ARGS__), #name)

}  // namespace
}  // namespace twofour
