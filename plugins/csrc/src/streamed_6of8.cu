#include "streamed_kernel.cuh"

namespace twofour {

template void streamed_configure_pattern<6>(const Multiprocessors&);
template void streamed_launch_pattern<6>(int, const SkinnyProblem&, const StreamedPlan&, cudaStream_t);

}  // namespace twofour
