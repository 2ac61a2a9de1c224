// cuBLASLt, loaded at run time: the dense kernel to beat, and what a layer uses where no sparse kernel wins.
#pragma once

#include <memory>

#include "backend.h"

namespace twofour {

std::unique_ptr<Backend> make_cublaslt(int sm);
int cublaslt_version();  // without a GPU; throws where the library is missing

}  // namespace twofour
