"""The table of the kernels' resources is read from the compiler's own report."""

from collections import Counter

from benchmarks.kernels import resources

REPORT = """ptxas info    : Compiling entry function '_Z8kernelINS_14StreamedConfigILi3ELi1ELi4ELi2EEEEEvN' for 'sm_90a'
ptxas info    : Function properties for x
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers
"""


def test_report_of_the_compiler_becomes_a_row() -> None:
    (kernel,) = resources.parse("streamed", REPORT, {(3, 1, 4, 2): Counter({"F2FP": 160, "HMMA": 32, "LDS": 28})})
    assert (kernel.format, kernel.tokens, kernel.registers, kernel.spills) == ("fp8", 8, 126, 12)
    assert kernel.in_flight() == 3 * 8 * 2560
    assert resources.table([kernel]).splitlines()[-1] == "| 2:4 | streamed | fp8 | 8 | 126 | 12 | 55 | 40 | 61 |"


def test_ring_that_does_not_fit_beside_x_holds_nothing() -> None:
    assert resources.Kernel("streamed", (0, 4, 2, 2), 238, 0, Counter()).in_flight() == 0
