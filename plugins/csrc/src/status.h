// Failures inside the library are thrown as Failure and turned into a status and a message at the C boundary.
#pragma once

#include <string>

#include "twofour.h"

namespace twofour {

struct Failure {
  twofour_status status;
  std::string message;  // one line: what is wrong, and what to do
};

[[noreturn]] void fail(twofour_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

void set_last_error(const std::string& message);
const char* last_error();
const char* status_name(twofour_status status);
const char* type_name(int type);
const char* kernel_name(int kernel);
constexpr char kKernels[] =
    "skinny (0), cusparselt (1), cublaslt (2), skinny-4of8 (3), skinny-5of8 (4), "
    "skinny-6of8 (5), hybrid (6), hybrid-4of8 (7)";

}  // namespace twofour
