// Memory that grows and is kept for the next call.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace twofour_cpu {

class Scratch {
 public:
  uint8_t* bytes(size_t size) {  // aligned to 64
    if (size > size_) {
      free(memory_);
      size_ = (size + size / 4 + 63) / 64 * 64;
      memory_ = static_cast<uint8_t*>(aligned_alloc(64, size_));
    }
    return memory_;
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(memory_); }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace twofour_cpu
