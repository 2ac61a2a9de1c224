#include "weights.h"

#include <cuda_fp8.h>

#include <algorithm>

#include "cuda_check.h"
#include "ptx.cuh"

namespace twofour {

namespace {

constexpr int kThreads = 256;

unsigned grid_for(int64_t work) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(work, kThreads), 1, int64_t{1} << 16));
}

__device__ int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t stride() { return static_cast<int64_t>(gridDim.x) * kThreads; }

__global__ void __launch_bounds__(kThreads)
    check_kernel(Form form, const Extent extent, const void* weight, int64_t groups, unsigned long long* first) {
  for (int64_t i = first_index(); i < groups; i += stride())
    if (violates(form, extent, weight, i)) atomicMin(first, static_cast<unsigned long long>(i));
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(Form form, const Extent extent, const void* weight, uint8_t* packed, int64_t words) {
  for (int64_t i = first_index(); i < words; i += stride()) pack_word(form, extent, weight, packed, i);
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Form form, const Extent extent, const uint8_t* packed, void* weight, int64_t words) {
  for (int64_t i = first_index(); i < words; i += stride()) unpack_word(form, extent, packed, weight, i);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    canonical_kernel(int type, const T* source, T* target, int64_t elements) {
  for (int64_t i = first_index(); i < elements; i += stride()) target[i] = is_zero(type, source[i]) ? T{0} : source[i];
}

template <class Out>
__device__ uint2 pack_four(const float (&v)[4]) {
  uint2 packed;
  Out* out = reinterpret_cast<Out*>(&packed);
  for (int j = 0; j < 4; ++j) out[j] = static_cast<Out>(v[j]);  // to nearest even
  return packed;
}

// A thread keeps four features, their scales and bias, and walks down the tokens: 16 bytes in, 8 bytes out.
template <class Quad, class Out>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(const Quad* __restrict__ sums,
                                                            const twofour_gemm gemm, uint2* __restrict__ y) {
  const int64_t quads = gemm.out_features / 4, quad = first_index();
  if (quad >= quads) return;
  float scales[4], shifts[4];
  for (int j = 0; j < 4; ++j) {
    scales[j] = gemm.channel_scales != nullptr ? gemm.channel_scales[4 * quad + j] : gemm.scale;
    shifts[j] = gemm.bias != nullptr ? static_cast<float>(static_cast<const Out*>(gemm.bias)[4 * quad + j]) : 0.0f;
  }
#pragma unroll 4
  for (int64_t token = blockIdx.y; token < gemm.tokens; token += gridDim.y) {
    const Quad four = __ldcs(sums + token * quads + quad);
    float values[4] = {static_cast<float>(four.x), static_cast<float>(four.y), static_cast<float>(four.z),
                       static_cast<float>(four.w)};
    for (int j = 0; j < 4; ++j) {
      values[j] = gpu::multiply(values[j], scales[j]);
      if (gemm.bias != nullptr) values[j] = gpu::add(values[j], shifts[j]);
    }
    uint2& target = y[token * (y_pitch(gemm) / 4) + quad];
    if (gemm.accumulate != 0) {
      const uint2 before = target;
      for (int j = 0; j < 4; ++j)
        values[j] = gpu::add(values[j], static_cast<float>(reinterpret_cast<const Out*>(&before)[j]));
    }
    target = pack_four<Out>(values);
  }
}

template <class Pair>
__device__ float2 as_floats(Pair pair);
template <>
__device__ float2 as_floats(__half2 pair) { return __half22float2(pair); }
template <>
__device__ float2 as_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }

__device__ uint16_t quantize_pair(int type, float2 v, float low, float high) {
  const float a = gpu::multiply(v.x, low), b = gpu::multiply(v.y, high);
  if (type == TWOFOUR_FP8) return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const int p = max(-128, min(127, __float2int_rn(a))), q = max(-128, min(127, __float2int_rn(b)));
  return static_cast<uint16_t>((p & 0xFF) | (q & 0xFF) << 8);
}

template <class Pair>  // 8 inputs, 16 bytes, a thread
__global__ void __launch_bounds__(kThreads) quantize_kernel(int type, const uint4* x, int64_t eights, int64_t in_features,
                                                            const float* multiplier, bool per_input, uint2* q) {
  for (int64_t i = first_index(); i < eights; i += stride()) {
    const uint4 words = x[i];
    const Pair* pairs = reinterpret_cast<const Pair*>(&words);
    const float* m = multiplier + (per_input ? 8 * i % in_features : 0);
    uint16_t out[4];
    for (int j = 0; j < 4; ++j)
      out[j] = quantize_pair(type, as_floats(pairs[j]), m[per_input ? 2 * j : 0], m[per_input ? 2 * j + 1 : 0]);
    q[i] = make_uint2(out[0] | static_cast<unsigned>(out[1]) << 16, out[2] | static_cast<unsigned>(out[3]) << 16);
  }
}

}  // namespace

int64_t first_violation_device(Form form, const Extent& extent, const void* weight, cudaStream_t stream) {
  const int64_t groups = extent.n * (extent.k / group_inputs(form.keep));
  unsigned long long first = ~0ull, *device_first = nullptr;
  check(cudaMalloc(&device_first, sizeof first), "cudaMalloc");
  const auto run = [&] {
    check(cudaMemcpyAsync(device_first, &first, sizeof first, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    check_kernel<<<grid_for(groups), kThreads, 0, stream>>>(form, extent, weight, groups, device_first);
    check(cudaGetLastError(), "check kernel launch");
    check(cudaMemcpyAsync(&first, device_first, sizeof first, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  };
  try {
    run();
  } catch (...) {
    cudaFree(device_first);
    throw;
  }
  check(cudaFree(device_first), "cudaFree");
  return first == ~0ull ? -1 : static_cast<int64_t>(first);
}

void pack_device(Form form, const Extent& extent, const void* weight, uint8_t* packed, cudaStream_t stream) {
  const int64_t words = packed_words(extent);
  pack_kernel<<<grid_for(words), kThreads, 0, stream>>>(form, extent, weight, packed, words);
  check(cudaGetLastError(), "pack kernel launch");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");  // a product on another stream may read the weight
}

void unpack_device(Form form, const Extent& extent, const uint8_t* packed, void* weight, cudaStream_t stream) {
  const int64_t words = packed_words(extent);
  unpack_kernel<<<grid_for(words), kThreads, 0, stream>>>(form, extent, packed, weight, words);
  check(cudaGetLastError(), "unpack kernel launch");
}

void copy_canonical(int type, int64_t elements, const void* source, void* target, cudaStream_t stream) {
  if (element_bytes(type) == 2)
    canonical_kernel<<<grid_for(elements), kThreads, 0, stream>>>(type, static_cast<const uint16_t*>(source),
                                                                  static_cast<uint16_t*>(target), elements);
  else
    canonical_kernel<<<grid_for(elements), kThreads, 0, stream>>>(type, static_cast<const uint8_t*>(source),
                                                                  static_cast<uint8_t*>(target), elements);
  check(cudaGetLastError(), "canonical kernel launch");
}

void apply_epilogue(const twofour_gemm& gemm, const void* sums, void* y, cudaStream_t stream) {
  constexpr int64_t kBlocks = 2048;  // several for each multiprocessor of any GPU
  const int64_t columns = ceil_div(gemm.out_features / 4, kThreads);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(std::clamp<int64_t>(kBlocks / columns, 1, gemm.tokens)));
  const auto launch = [&](auto quad, auto out) {
    using Quad = decltype(quad);
    epilogue_kernel<Quad, decltype(out)><<<grid, kThreads, 0, stream>>>(static_cast<const Quad*>(sums), gemm,
                                                                        static_cast<uint2*>(y));
  };
  const bool integer = gemm.type == TWOFOUR_INT8, half = gemm.out_type == TWOFOUR_FP16;
  if (integer && half) launch(int4{}, __half{});
  else if (integer) launch(int4{}, __nv_bfloat16{});
  else if (half) launch(float4{}, __half{});
  else launch(float4{}, __nv_bfloat16{});
  check(cudaGetLastError(), "epilogue kernel launch");
}

void quantize(int type, int x_type, int64_t tokens, int64_t in_features, const void* x, const float* multiplier,
              int64_t count, uint8_t* q, cudaStream_t stream) {
  const int64_t eights = tokens * in_features / 8;
  const auto launch = [&](auto kernel) {
    kernel<<<grid_for(eights), kThreads, 0, stream>>>(type, static_cast<const uint4*>(x), eights, in_features, multiplier,
                                                      count > 1, reinterpret_cast<uint2*>(q));
  };
  if (x_type == TWOFOUR_FP16) launch(quantize_kernel<__half2>);
  else launch(quantize_kernel<__nv_bfloat162>);
  check(cudaGetLastError(), "quantize kernel launch");
}

}  // namespace twofour
