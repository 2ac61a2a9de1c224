// The context's weights: dense ones to what a kernel reads, and back.
#include "context.h"
#include "weights.h"

using namespace twofour;

static Extent extent_of(const twofour_gemm& g) { return {g.out_features, g.in_features, g.in_features}; }

// Where a part of a weight begins.
static int64_t offset_of(const twofour_gemm& g, const Part& part) {
  return (part.row * g.in_features + part.input) * element_bytes(g.type);
}

size_t twofour_context::weight_bytes(const twofour_gemm& g) {
  if (is_skinny(g)) return packed_bytes(form_of(g), g.out_features, g.in_features);
  if (is_hybrid(g)) return hybrid_parts(g).bytes();
  backend(g.kernel).validate(g);
  return backend(g.kernel).weight_bytes(g);
}

int64_t twofour_context::first_violation(Form form, const Extent& extent, const void* weight, cudaStream_t stream) {
  const int group = group_inputs(form.keep);
  if (extent.k % group != 0)
    fail(TWOFOUR_MISALIGNED, "in_features=%lld is not a multiple of %d: no %d:%d pattern", static_cast<long long>(extent.k),
         group, form.keep, group);
  return host() ? first_violation_host(form, extent, weight) : first_violation_device(form, extent, weight, stream);
}

void twofour_context::require_pattern(Form form, const Extent& extent, const void* weight, cudaStream_t stream) {
  const int64_t violation = first_violation(form, extent, weight, stream);
  if (violation < 0) return;
  const int inputs = group_inputs(form.keep);
  const int64_t row = violation / (extent.k / inputs), group = violation % (extent.k / inputs);
  fail(TWOFOUR_NOT_2_4, "the weight is not %d:%d: row %lld, group %lld (inputs %lld to %lld) has more than %d nonzeros",
       form.keep, inputs, static_cast<long long>(row), static_cast<long long>(group), static_cast<long long>(group * inputs),
       static_cast<long long>(group * inputs + inputs - 1), form.keep);
}

void twofour_context::pack(Form form, const Extent& extent, const void* weight, uint8_t* packed, cudaStream_t stream) {
  if (host()) pack_host(form, extent, weight, packed);
  else pack_device(form, extent, weight, packed, stream);
}

void twofour_context::unpack(Form form, const Extent& extent, const uint8_t* packed, void* weight, cudaStream_t stream) {
  if (host()) unpack_host(form, extent, packed, weight);
  else unpack_device(form, extent, packed, weight, stream);
}

void twofour_context::prepare_weight(const twofour_gemm& g, const void* weight, void* prepared, cudaStream_t stream) {
  uint8_t* const packed = static_cast<uint8_t*>(prepared);
  if (g.kernel == TWOFOUR_CUBLASLT) return backend(g.kernel).prepare_weight(g, weight, prepared, stream);
  if (is_hybrid(g)) {
    const Parts parts = hybrid_parts(g);
    const Extent sparse = parts.sparse.extent(g.in_features);
    require_pattern(parts.sparse.form, sparse, weight, stream);
    pack(parts.sparse.form, sparse, weight, packed, stream);
    const uint8_t* const dense = static_cast<const uint8_t*>(weight) + offset_of(g, parts.dense);
    return pack(parts.dense.form, parts.dense.extent(g.in_features), dense, packed + parts.dense.offset, stream);
  }
  require_pattern(g.kernel == TWOFOUR_CUSPARSELT ? Form{g.type, kKeep2of4} : form_of(g), extent_of(g), weight, stream);
  if (is_skinny(g)) return pack(form_of(g), extent_of(g), weight, packed, stream);
  backend(g.kernel).validate(g);
  backend(g.kernel).prepare_weight(g, weight, prepared, stream);
}

void twofour_context::unpack_weight(const twofour_gemm& g, const void* prepared, void* weight, cudaStream_t stream) {
  const uint8_t* const packed = static_cast<const uint8_t*>(prepared);
  if (is_hybrid(g)) {
    const Parts parts = hybrid_parts(g);
    for (const Part* part : {&parts.sparse, &parts.dense})
      unpack(part->form, part->extent(g.in_features), packed + part->offset,
             static_cast<uint8_t*>(weight) + offset_of(g, *part), stream);
    return;
  }
  if (!is_skinny(g))
    fail(TWOFOUR_UNSUPPORTED, "only a form that twofour packs can be unpacked, not %s's", kernel_name(g.kernel));
  unpack(form_of(g), extent_of(g), packed, weight, stream);
}

twofour_stamp twofour_context::stamp(const twofour_gemm& g) {
  if (is_hybrid(g))
    fail(TWOFOUR_UNSUPPORTED, "a weight of %s has no stamp: prepare it where it runs", kernel_name(g.kernel));
  twofour_stamp s{g.kernel, g.type, g.out_features, g.in_features, 0, kLayoutVersion};
  if (g.kernel == TWOFOUR_CUSPARSELT) {
    s.sm = info.sm;
    s.version = backend(g.kernel).version();
  }
  return s;
}
