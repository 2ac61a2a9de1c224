#include "hybrid_kernel.cuh"

namespace twofour {

template void hybrid_configure_pattern<4>(const Multiprocessors&);
template void hybrid_launch_pattern<4>(int, const HybridProblem&, const StreamedPlan&, cudaStream_t);

}  // namespace twofour
