"""Numbers that more than one part needs. Imports nothing heavy, so that `twofour --help` stays fast."""

from plugins.common.patterns import HYBRID, PATTERNS, cpu_kernel, hybrid_kernel, skinny_kernel

GPU = "H100-SXM"  # that times are predicted for
BATCH = 8  # sequences decoded together, in a prediction
CONTEXT = 1024  # tokens of context, in a prediction
ROUNDS = 8  # interleaved rounds of a benchmark

SPARSE_KERNELS = frozenset(
    {"cusparselt", *map(skinny_kernel, PATTERNS), *map(hybrid_kernel, HYBRID), *map(cpu_kernel, PATTERNS)}
)
MAX_SKINNY_TOKENS = 64  # of the skinny GEMM kernels
LEAST_GAIN = 1.02  # dense time over sparse time: a sparse kernel below it is not worth a second weight layout
