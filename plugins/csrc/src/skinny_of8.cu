#include "skinny_kernel.cuh"

namespace twofour {

template void skinny_configure_pattern<4>();
template void skinny_configure_pattern<5>();
template void skinny_configure_pattern<6>();
template void skinny_launch_pattern<4>(int, const SkinnyProblem&, cudaStream_t);
template void skinny_launch_pattern<5>(int, const SkinnyProblem&, cudaStream_t);
template void skinny_launch_pattern<6>(int, const SkinnyProblem&, cudaStream_t);

}  // namespace twofour
