// cuSPARSELt, loaded at run time.  D[N, M] = alpha W[N, K] X^T[K, M], column-major D: y[M, N] in memory.
#pragma once

#include <memory>

#include "backend.h"

namespace twofour {

constexpr int kOldestCusparselt = 801;  // 0.8.1: 0.8.0 regressed on H100 and L4

std::unique_ptr<Backend> make_cusparselt(int sm);
int cusparselt_version();  // without a GPU; throws where the library is missing or too old

}  // namespace twofour
