// What a problem must hold whatever its kernel, and for the skinny and the hybrid kernels.
#include "context.h"
#include "hybrid.h"

using namespace twofour;

static void validate_pitch(const char* name, int64_t pitch, int64_t features, int bytes) {
  if (pitch != 0 && (pitch < features || pitch * bytes % 16 != 0))
    fail(TWOFOUR_MISALIGNED, "%s_pitch=%lld must be %lld or more, and a multiple of %d (16 bytes); copy it", name,
         static_cast<long long>(pitch), static_cast<long long>(features), 16 / bytes);
}

void twofour_context::validate_hybrid(const twofour_gemm& g) const {
  if (!can_stream())
    fail(TWOFOUR_SM_UNSUPPORTED, "%s needs compute capability 9.0 or newer, this GPU has %d.%d; multiply the sparse and the "
         "dense part by kernels of their own", kernel_name(g.kernel), info.sm / 10, info.sm % 10);
  const auto inside = [](int64_t sparse, int64_t all) { return sparse > 0 && sparse < all; };
  const bool rows = g.sparse_inputs == 0 && inside(g.sparse_rows, g.out_features);
  if (!rows && !(g.sparse_rows == 0 && inside(g.sparse_inputs, g.in_features)))
    fail(TWOFOUR_INVALID_ARGUMENT, "sparse_rows=%lld and sparse_inputs=%lld of [%lld, %lld]: one must be 0, the other a part of "
         "its side", static_cast<long long>(g.sparse_rows), static_cast<long long>(g.sparse_inputs),
         static_cast<long long>(g.out_features), static_cast<long long>(g.in_features));
  const int64_t multiple = 16 / element_bytes(g.type);
  if (g.sparse_inputs % multiple != 0)
    fail(TWOFOUR_MISALIGNED, "sparse_inputs=%lld is not a multiple of %lld (16 bytes of %s)",
         static_cast<long long>(g.sparse_inputs), static_cast<long long>(multiple), type_name(g.type));
}

void twofour_context::validate(const twofour_gemm& g) const {
  if (g.kernel < TWOFOUR_SKINNY || g.kernel > TWOFOUR_HYBRID_4OF8)
    fail(TWOFOUR_INVALID_ARGUMENT, "kernel %d is not one of %s", g.kernel, kKernels);
  if (g.type < TWOFOUR_FP16 || g.type > TWOFOUR_FP8)
    fail(TWOFOUR_INVALID_ARGUMENT, "type %d is not one of fp16 (0), bf16 (1), int8 (2), fp8 (3)", g.type);
  if (g.out_type != TWOFOUR_FP16 && g.out_type != TWOFOUR_BF16)
    fail(TWOFOUR_INVALID_ARGUMENT, "out_type %d is not fp16 (0) or bf16 (1)", g.out_type);
  if (g.out_features < 1 || g.in_features < 1 || g.out_features > INT32_MAX || g.in_features > INT32_MAX)
    fail(TWOFOUR_INVALID_ARGUMENT, "a weight cannot be [%lld, %lld]", static_cast<long long>(g.out_features),
         static_cast<long long>(g.in_features));
  if (g.accumulate != 0 && (g.accumulate != 1 || g.kernel != TWOFOUR_CUBLASLT))
    fail(TWOFOUR_UNSUPPORTED, "accumulate=%d of %s: cublaslt alone adds to what y holds (1)", g.accumulate, kernel_name(g.kernel));
  validate_pitch("x", g.x_pitch, g.in_features, element_bytes(g.type));
  validate_pitch("y", g.y_pitch, g.out_features, 2);
  if (!is_skinny(g) && !is_hybrid(g)) return;
  const int64_t multiple = 16 / element_bytes(g.type);
  if (g.in_features % multiple != 0)
    fail(TWOFOUR_MISALIGNED, "in_features=%lld is not a multiple of %lld (16 bytes of %s); pad x and the weight to %lld",
         static_cast<long long>(g.in_features), static_cast<long long>(multiple), type_name(g.type),
         static_cast<long long>(round_up(g.in_features, multiple)));
  if (g.type == TWOFOUR_FP8 && !host() && info.sm < 89)
    fail(TWOFOUR_SM_UNSUPPORTED, "fp8 needs compute capability 8.9 or newer, this GPU has %d.%d; use int8", info.sm / 10,
         info.sm % 10);
  if (is_hybrid(g)) validate_hybrid(g);
}
