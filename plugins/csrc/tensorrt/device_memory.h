// Memory of the device that a layer runs on, or the host's where TWOFOUR_PLUGIN_DEVICE=host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "layer.h"

namespace twofour_tensorrt {

inline bool on_host() {
  const char* device = std::getenv("TWOFOUR_PLUGIN_DEVICE");
  return device != nullptr && std::strcmp(device, "host") == 0;
}

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw Error{std::string(call) + ": " + cudaGetErrorString(error)};
}

// Device memory, or the host's in the test harness; aligned either way.
inline void* allocate(int device, size_t bytes) {
  void* memory = nullptr;
  if (device == TWOFOUR_HOST) memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  else check_cuda(cudaMalloc(&memory, bytes), "cudaMalloc");
  if (memory == nullptr) throw Error{"out of host memory"};
  return memory;
}

inline void release(int device, void* memory) {
  if (device == TWOFOUR_HOST) std::free(memory);
  else cudaFree(memory);  // TensorRT may call this after the device is gone
}

inline void* upload(int device, const void* source, size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = allocate(device, bytes);
  if (device == TWOFOUR_HOST) std::memcpy(memory, source, bytes);
  else check_cuda(cudaMemcpy(memory, source, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

// Device memory freed at the end of its scope.
struct Scratch {
  Scratch(int device, size_t bytes) : device_(device), bytes(bytes), memory(allocate(device, bytes)) {}
  ~Scratch() { release(device_, memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  int device_;
  size_t bytes;
  void* memory;
};

}  // namespace twofour_tensorrt
