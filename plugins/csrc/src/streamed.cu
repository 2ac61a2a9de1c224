#include "streamed_kernel.cuh"

namespace twofour {

template void streamed_configure_pattern<kKeep2of4>(const Multiprocessors&);
template void streamed_launch_pattern<kKeep2of4>(int, const SkinnyProblem&, const StreamedPlan&, cudaStream_t);

}  // namespace twofour
