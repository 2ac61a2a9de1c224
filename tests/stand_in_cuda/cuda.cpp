// Stands in for the CUDA runtime and for our own device kernels, so that everything else of libtwofour runs on a CPU:
// device memory is the host's, streams run at once. STAND_IN_SM describes the GPU, STAND_IN_MEMORY (bytes) the largest
// allocation that succeeds; the stream 0xC counts as capturing, where synchronising is an error.
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "hybrid.h"
#include "hybrid_problem.h"
#include "simt.h"
#include "skinny.h"
#include "skinny_problem.h"
#include "streamed.h"
#include "weights.h"

namespace {

size_t used = 0;
std::map<void*, size_t> allocations;

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atol(text) : otherwise;
}

bool capturing(cudaStream_t stream) { return stream == reinterpret_cast<cudaStream_t>(0xC); }

}  // namespace

extern "C" {

__attribute__((visibility("default"))) size_t stand_in_used() { return used; }  // bytes allocated and not freed

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Stand-in");
  const int sm = static_cast<int>(setting("STAND_IN_SM", 90));
  properties->major = sm / 10, properties->minor = sm % 10;
  properties->multiProcessorCount = 4;
  properties->l2CacheSize = 1 << 20;
  properties->sharedMemPerMultiprocessor = 228 * 1024;
  properties->sharedMemPerBlockOptin = 227 * 1024;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "stand-in error";
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (bytes > static_cast<size_t>(setting("STAND_IN_MEMORY", 1L << 33))) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  allocations[*memory] = bytes;
  used += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const auto found = allocations.find(memory);
  if (found == allocations.end()) return cudaErrorInvalidValue;
  used -= found->second;
  allocations.erase(found);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return std::memset(memory, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) { return cudaMemset(memory, value, bytes); }
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(target, source, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(target, source, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  if (width > target_pitch || width > source_pitch) return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row)
    cudaMemcpy(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch, width, kind);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return capturing(stream) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  static float last = 0;
  return *ms = last = last == 0 ? 2.0f : last * 0.99f, cudaSuccess;  // each algorithm looks faster than the one before
}

}  // extern "C"

namespace twofour {

template <int kKeep>
void skinny_configure_pattern() {}
template <int kKeep>
void skinny_launch_pattern(int type, const SkinnyProblem& problem, cudaStream_t) {
  skinny_simulate({type, kKeep}, problem);
}
template <int kKeep>
void streamed_configure_pattern(const Multiprocessors&) {}
template <int kKeep>
void streamed_launch_pattern(int type, const SkinnyProblem& problem, const StreamedPlan& plan, cudaStream_t) {
  streamed_simulate({type, kKeep}, problem, plan);
}
#define TWOFOUR_STAND_IN(keep)                                                                      \
  template void skinny_configure_pattern<keep>();                                                   \
  template void skinny_launch_pattern<keep>(int, const SkinnyProblem&, cudaStream_t);               \
  template void streamed_configure_pattern<keep>(const Multiprocessors&);                           \
  template void streamed_launch_pattern<keep>(int, const SkinnyProblem&, const StreamedPlan&, cudaStream_t)
TWOFOUR_STAND_IN(2);
TWOFOUR_STAND_IN(4);
TWOFOUR_STAND_IN(5);
TWOFOUR_STAND_IN(6);
template <int kKeep>
void hybrid_configure_pattern(const Multiprocessors&) {}
template <int kKeep>
void hybrid_launch_pattern(int type, const HybridProblem& problem, const StreamedPlan& plan, cudaStream_t) {
  hybrid_simulate({type, kKeep}, problem, plan);
}
template void hybrid_configure_pattern<2>(const Multiprocessors&);
template void hybrid_configure_pattern<4>(const Multiprocessors&);
template void hybrid_launch_pattern<2>(int, const HybridProblem&, const StreamedPlan&, cudaStream_t);
template void hybrid_launch_pattern<4>(int, const HybridProblem&, const StreamedPlan&, cudaStream_t);
int64_t first_violation_device(Form form, const Extent& extent, const void* weight, cudaStream_t) {
  return first_violation_host(form, extent, weight);
}
void pack_device(Form form, const Extent& extent, const void* weight, uint8_t* packed, cudaStream_t) {
  pack_host(form, extent, weight, packed);
}
void unpack_device(Form form, const Extent& extent, const uint8_t* packed, void* weight, cudaStream_t) {
  unpack_host(form, extent, packed, weight);
}
void copy_canonical(int type, int64_t elements, const void* source, void* target, cudaStream_t) {
  const int size = element_bytes(type);
  for (int64_t i = 0; i < elements; ++i) {
    const unsigned value = load_element(type, source, i), clean = is_zero(type, value) ? 0 : value;
    std::memcpy(static_cast<uint8_t*>(target) + i * size, &clean, static_cast<size_t>(size));
  }
}
void apply_epilogue(const twofour_gemm& g, const void* sums, void* y, cudaStream_t) {
  for (int64_t i = 0; i < g.tokens * g.out_features; ++i) {
    const int64_t n = i % g.out_features;
    const float sum = g.type == TWOFOUR_INT8 ? static_cast<float>(static_cast<const int*>(sums)[i])
                                             : static_cast<const float*>(sums)[i];
    float value = sum * (g.channel_scales != nullptr ? g.channel_scales[n] : g.scale);
    if (g.bias != nullptr) value += gpu::load_float(g.out_type, g.bias, n);
    const int64_t place = i / g.out_features * y_pitch(g) + n;
    if (g.accumulate != 0) value += gpu::load_float(g.out_type, y, place);
    gpu::store_float(g.out_type, y, place, value);
  }
}
void quantize(int, int, int64_t, int64_t, const void*, const float*, int64_t, uint8_t*, cudaStream_t) {
  fail(TWOFOUR_UNSUPPORTED, "the stand-in has no quantize");
}

}  // namespace twofour
