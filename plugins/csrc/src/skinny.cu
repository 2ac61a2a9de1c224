#include "skinny_kernel.cuh"

namespace twofour {

template void skinny_configure_pattern<kKeep2of4>();
template void skinny_launch_pattern<kKeep2of4>(int, const SkinnyProblem&, cudaStream_t);

}  // namespace twofour
