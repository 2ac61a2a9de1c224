// cuBLASLt, loaded at run time: the dense baseline, and the kernel of layers where no sparse kernel is faster.
#pragma once

#include <memory>

#include "backend.h"

namespace twofour {

std::unique_ptr<Backend> make_cublaslt(int sm);
int cublaslt_version();  // without a GPU; throws where the library is missing

}  // namespace twofour
