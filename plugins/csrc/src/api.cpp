// The C boundary: statuses for exceptions, a lock and the right device around every call.
#include <algorithm>
#include <new>

#include "context.h"
#include "cublaslt.h"
#include "cuda_check.h"
#include "cusparselt.h"
#include "status.h"
#include "weights.h"

using namespace twofour;

namespace {

constexpr int kWarmups = 2, kTimings = 7;

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

template <class F>
twofour_status guard(F&& f) {
  try {
    f();
    return TWOFOUR_OK;
  } catch (const Failure& failure) {
    set_last_error(failure.message);
    return failure.status;
  } catch (const std::bad_alloc&) {
    set_last_error("out of host memory");
    return TWOFOUR_OUT_OF_MEMORY;
  }
}

template <class F>
twofour_status guard(twofour_context* context, F&& f) {
  return guard([&] {
    if (context == nullptr) fail(TWOFOUR_INVALID_ARGUMENT, "the context is NULL");
    const std::lock_guard<std::mutex> lock(context->mutex);
    const DeviceScope scope(context->info.device);
    f();
  });
}

void require(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (pointer == nullptr) fail(TWOFOUR_INVALID_ARGUMENT, "a required pointer is NULL");
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

// Median over a few runs, each after overwriting the caches.
template <class F>
float time_us(F&& run, void* flush, size_t flush_bytes, cudaStream_t stream) {
  const Event begin, end;
  std::vector<float> times;
  for (int i = 0; i < kWarmups + kTimings; ++i) {
    if (flush != nullptr) check(cudaMemsetAsync(flush, 0, flush_bytes, stream), "cudaMemsetAsync");
    check(cudaEventRecord(begin.event, stream), "cudaEventRecord");
    run();
    check(cudaEventRecord(end.event, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end.event), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.event, end.event), "cudaEventElapsedTime");
    if (i >= kWarmups) times.push_back(1000 * ms);
  }
  std::nth_element(times.begin(), times.begin() + kTimings / 2, times.end());
  return times[kTimings / 2];
}

}  // namespace

extern "C" {

int twofour_version(void) { return TWOFOUR_VERSION; }
const char* twofour_status_name(twofour_status status) { return status_name(status); }
const char* twofour_last_error(void) { return last_error(); }

twofour_status twofour_library_version(twofour_kernel kernel, int32_t* version) {
  return guard([&] {
    require({version});
    *version = 0;
    switch (kernel) {
      case TWOFOUR_SKINNY:
      case TWOFOUR_SKINNY_4OF8:
      case TWOFOUR_SKINNY_5OF8:
      case TWOFOUR_SKINNY_6OF8:
      case TWOFOUR_HYBRID:
      case TWOFOUR_HYBRID_4OF8: *version = kLayoutVersion; return;
      case TWOFOUR_CUSPARSELT: *version = cusparselt_version(); return;
      case TWOFOUR_CUBLASLT: *version = cublaslt_version(); return;
    }
    fail(TWOFOUR_INVALID_ARGUMENT, "kernel %d is not one of %s", kernel, kKernels);
  });
}

twofour_status twofour_create(int device, twofour_context** context) {
  return guard([&] {
    require({context});
    *context = nullptr;
    *context = new twofour_context(device);
  });
}

void twofour_destroy(twofour_context* context) { delete context; }

twofour_status twofour_get_info(twofour_context* context, twofour_info* info) {
  return guard(context, [&] {
    require({info});
    *info = context->info;
    guard([&] { info->cusparselt_version = cusparselt_version(); });  // 0 where missing
    guard([&] { info->cublaslt_version = cublaslt_version(); });
  });
}

twofour_status twofour_check(twofour_context* context, twofour_type type, int64_t out_features, int64_t in_features,
                             const void* weight, void* stream, int64_t* row, int64_t* group) {
  return guard(context, [&] {
    require({weight});
    const int64_t first = context->first_violation({type, kKeep2of4}, {out_features, in_features, in_features}, weight, as_stream(stream));
    if (first < 0) return;
    const int64_t groups = in_features / 4;
    if (row != nullptr) *row = first / groups;
    if (group != nullptr) *group = first % groups;
    fail(TWOFOUR_NOT_2_4, "the weight is not 2:4: row %lld, group %lld has more than 2 nonzeros",
         static_cast<long long>(first / groups), static_cast<long long>(first % groups));
  });
}

twofour_status twofour_weight_bytes(twofour_context* context, const twofour_gemm* gemm, size_t* bytes) {
  return guard(context, [&] {
    require({gemm, bytes});
    context->validate(*gemm);
    *bytes = context->weight_bytes(*gemm);
  });
}

twofour_status twofour_prepare_weight(twofour_context* context, const twofour_gemm* gemm, const void* weight,
                                      void* prepared, void* stream) {
  return guard(context, [&] {
    require({gemm, weight, prepared});
    context->validate(*gemm);
    context->prepare_weight(*gemm, weight, prepared, as_stream(stream));
  });
}

twofour_status twofour_unpack_weight(twofour_context* context, const twofour_gemm* gemm, const void* prepared,
                                     void* weight, void* stream) {
  return guard(context, [&] {
    require({gemm, weight, prepared});
    context->validate(*gemm);
    context->unpack_weight(*gemm, prepared, weight, as_stream(stream));
  });
}

twofour_status twofour_get_stamp(twofour_context* context, const twofour_gemm* gemm, twofour_stamp* stamp) {
  return guard(context, [&] {
    require({gemm, stamp});
    context->validate(*gemm);
    *stamp = context->stamp(*gemm);
  });
}

twofour_status twofour_check_stamp(twofour_context* context, const twofour_gemm* gemm, const twofour_stamp* stamp) {
  return guard(context, [&] {
    require({gemm, stamp});
    context->validate(*gemm);
    const twofour_stamp wanted = context->stamp(*gemm);
    if (stamp->kernel != wanted.kernel || stamp->type != wanted.type || stamp->out_features != wanted.out_features ||
        stamp->in_features != wanted.in_features)
      fail(TWOFOUR_WRONG_BUILD, "the weight was prepared for %s, %s, [%lld, %lld]; the call needs %s, %s, [%lld, %lld]",
           kernel_name(stamp->kernel), type_name(stamp->type), static_cast<long long>(stamp->out_features),
           static_cast<long long>(stamp->in_features), kernel_name(wanted.kernel), type_name(wanted.type),
           static_cast<long long>(wanted.out_features), static_cast<long long>(wanted.in_features));
    if (stamp->sm != wanted.sm || stamp->version != wanted.version)
      fail(TWOFOUR_WRONG_BUILD, "the weight was prepared for SM %d and version %d, here are SM %d and version %d; "
           "prepare it again from the dense weight", stamp->sm, stamp->version, wanted.sm, wanted.version);
  });
}

twofour_status twofour_plan(twofour_context* context, const twofour_gemm* gemm) {
  return guard(context, [&] {
    require({gemm});
    context->validate(*gemm);
    context->plan(*gemm);
  });
}

twofour_status twofour_workspace_bytes(twofour_context* context, const twofour_gemm* gemm, size_t* bytes) {
  return guard(context, [&] {
    require({gemm, bytes});
    context->validate(*gemm);
    *bytes = context->workspace_bytes(*gemm);
  });
}

twofour_status twofour_search(twofour_context* context, const twofour_gemm* gemm, const void* x, const void* prepared,
                              void* y, void* workspace, size_t workspace_bytes, void* flush, size_t flush_bytes,
                              void* stream, twofour_search_result* result) {
  return guard(context, [&] {
    require({gemm, x, prepared, y, result});
    context->validate(*gemm);
    if (context->host()) fail(TWOFOUR_NO_GPU, "nothing to time on the host");
    *result = {0, 0, 0};
    twofour_algorithm best{};
    for (const twofour_algorithm& candidate : context->algorithms(*gemm)) {
      twofour_status status = guard([&] { context->set_algorithm(*gemm, candidate); });
      if (status == TWOFOUR_OK && context->workspace_bytes(*gemm) > workspace_bytes) {
        ++result->over_workspace;
        continue;
      }
      float us = 0;
      if (status == TWOFOUR_OK)
        status = guard([&] {
          us = time_us([&] { context->matmul(*gemm, x, prepared, y, workspace, workspace_bytes, as_stream(stream)); },
                       flush, flush_bytes, as_stream(stream));
        });
      if (status == TWOFOUR_CUDA_ERROR) fail(status, "%s", last_error());  // sticky: all later results are undefined
      if (status != TWOFOUR_OK) continue;  // a configuration that this shape cannot take
      if (result->tried++ == 0 || us < result->best_us) {
        result->best_us = us;
        best = candidate;
      }
    }
    if (result->tried == 0)
      fail(result->over_workspace > 0 ? TWOFOUR_WORKSPACE_TOO_SMALL : TWOFOUR_UNSUPPORTED,
           "no algorithm of %s ran; %d need more workspace than %zu bytes", kernel_name(gemm->kernel),
           result->over_workspace, workspace_bytes);
    context->set_algorithm(*gemm, best);
  });
}

twofour_status twofour_list_algorithms(twofour_context* context, const twofour_gemm* gemm,
                                       twofour_algorithm* algorithms, int32_t capacity, int32_t* count) {
  return guard(context, [&] {
    require({gemm, algorithms, count});
    context->validate(*gemm);
    const std::vector<twofour_algorithm> all = context->algorithms(*gemm);
    *count = static_cast<int32_t>(all.size());
    std::copy_n(all.begin(), std::min<size_t>(all.size(), static_cast<size_t>(std::max(capacity, 0))), algorithms);
  });
}

twofour_status twofour_get_algorithm(twofour_context* context, const twofour_gemm* gemm, twofour_algorithm* algorithm) {
  return guard(context, [&] {
    require({gemm, algorithm});
    context->validate(*gemm);
    *algorithm = context->algorithm(*gemm);
  });
}

twofour_status twofour_set_algorithm(twofour_context* context, const twofour_gemm* gemm,
                                     const twofour_algorithm* algorithm) {
  return guard(context, [&] {
    require({gemm, algorithm});
    context->validate(*gemm);
    context->set_algorithm(*gemm, *algorithm);
  });
}

twofour_status twofour_quantize(twofour_context* context, twofour_type type, twofour_type x_type, int64_t tokens,
                                int64_t in_features, const void* x, const float* multiplier, int64_t count, void* q,
                                void* stream) {
  return guard(context, [&] {
    require({x, multiplier, q});
    if (context->host()) fail(TWOFOUR_NO_GPU, "activations are quantized on a GPU only");
    if ((type != TWOFOUR_INT8 && type != TWOFOUR_FP8) || (x_type != TWOFOUR_FP16 && x_type != TWOFOUR_BF16))
      fail(TWOFOUR_INVALID_ARGUMENT, "activations are quantized from fp16 or bf16 to int8 or fp8, not from %s to %s",
           type_name(x_type), type_name(type));
    if (tokens < 1 || in_features < 1 || (count != 1 && count != in_features))
      fail(TWOFOUR_INVALID_ARGUMENT, "%lld multipliers for [%lld, %lld]: 1 or one an input", static_cast<long long>(count),
           static_cast<long long>(tokens), static_cast<long long>(in_features));
    if (in_features % 8 != 0 || reinterpret_cast<uintptr_t>(x) % 16 != 0 || reinterpret_cast<uintptr_t>(q) % 8 != 0)
      fail(TWOFOUR_MISALIGNED, "in_features=%lld must be a multiple of 8 and x begin at a multiple of 16 bytes",
           static_cast<long long>(in_features));
    quantize(type, x_type, tokens, in_features, x, multiplier, count, static_cast<uint8_t*>(q), as_stream(stream));
  });
}

twofour_status twofour_matmul(twofour_context* context, const twofour_gemm* gemm, const void* x, const void* prepared,
                              void* y, void* workspace, size_t workspace_bytes, void* stream) {
  return guard(context, [&] {
    require({gemm, x, prepared, y});
    context->validate(*gemm);
    context->matmul(*gemm, x, prepared, y, workspace, workspace_bytes, as_stream(stream));
  });
}

}  // extern "C"
