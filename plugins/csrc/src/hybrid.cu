#include "hybrid_kernel.cuh"

namespace twofour {

template void hybrid_configure_pattern<kKeep2of4>(const Multiprocessors&);
template void hybrid_launch_pattern<kKeep2of4>(int, const HybridProblem&, const StreamedPlan&, cudaStream_t);

}  // namespace twofour
