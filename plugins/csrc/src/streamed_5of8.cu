#include "streamed_kernel.cuh"

namespace twofour {

template void streamed_configure_pattern<5>(const Multiprocessors&);
template void streamed_launch_pattern<5>(int, const SkinnyProblem&, const StreamedPlan&, cudaStream_t);

}  // namespace twofour
