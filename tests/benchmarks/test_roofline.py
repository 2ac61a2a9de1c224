"""Limits: the bytes of 2:4, both sides of the roofline, whole-model ceilings, and what a card cannot run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.roofline import roofline
from benchmarks.roofline.roofline import gpu
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import Pattern

HIDDEN, INNER, KEYS, BLOCKS, VOCABULARY = 4096, 14336, 1024, 32, 128256
HEAD = LinearShape(VOCABULARY, HIDDEN, name="lm_head")


def llama_8b(format: str, sparse: bool = False, sparse_attention: bool | None = None) -> list[LinearShape]:
    """Llama-3.1-8B: one format, lm_head in 16 bit; q, k, v and gate, up as one product each."""
    attention = sparse if sparse_attention is None else sparse_attention
    block = [
        LinearShape(HIDDEN + 2 * KEYS, HIDDEN, format, attention),
        LinearShape(HIDDEN, HIDDEN, format, attention),
        LinearShape(2 * INNER, HIDDEN, format, sparse),
        LinearShape(HIDDEN, INNER, format, sparse),
    ]
    return block * BLOCKS + [HEAD]


@pytest.mark.parametrize(
    ("layers", "gigabytes"),
    [
        (llama_8b("bf16"), 15.01),
        (llama_8b("bf16", sparse=True), 8.90),
        (llama_8b("fp8"), 8.03),
        (llama_8b("fp8", sparse=True), 5.41),
        (llama_8b("fp8", sparse=True, sparse_attention=False), 5.92),
    ],
)
def test_bytes_that_llama_8b_reads_a_decode_step(layers: list[LinearShape], gigabytes: float) -> None:
    ceiling = roofline.decode_ceiling(gpu("H100"), layers, batch=1, context=0, kv_bytes_per_token=0)
    assert ceiling.weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_fp8_2_of_4_decodes_at_most_1_45_times_as_fast_as_fp8() -> None:
    card = gpu("H100-SXM")
    dense = roofline.decode_ceiling(card, llama_8b("fp8"), 1, 0, 0)
    built = roofline.decode_ceiling(card, llama_8b("fp8", sparse=True), 1, 0, 0)
    assert built.bound == dense.bound == "memory"
    assert built.tokens_per_second is not None
    assert dense.tokens_per_second is not None
    assert dense.weight_bytes / built.weight_bytes == pytest.approx(1.48, abs=0.01)
    assert built.tokens_per_second / dense.tokens_per_second == pytest.approx(
        1.45, abs=0.01
    )  # 129 launches on each side


@pytest.mark.parametrize(("format", "share"), [("bf16", 0.5625), ("fp16", 0.5625), ("int8", 0.625), ("fp8", 0.625)])
def test_bytes_of_2_of_4_against_dense(format: str, share: float) -> None:
    assert LinearShape(256, 512, format, 1.0).nbytes == share * LinearShape(256, 512, format).nbytes


@pytest.mark.parametrize(("pattern", "share"), [("4:8", 5 / 8), ("5:8", 6 / 8), ("6:8", 7 / 8)])
def test_n_of_8_saves_bytes_at_8_bit_and_no_multiplications(pattern: Pattern, share: float) -> None:
    dense = LinearShape(256, 512, "int8").nbytes
    assert LinearShape(256, 512, "int8", 1.0, pattern).nbytes == share * dense
    assert LinearShape(256, 512, "int8", 0.5, pattern).nbytes == (1 + share) / 2 * dense
    many = [LinearShape(8192, 8192, "int8", fraction, pattern) for fraction in (0.0, 1.0)]
    assert len({roofline.gemm_time(gpu("A100"), 32768, layer).seconds for layer in many}) == 1
    few = [LinearShape(65536, 65536, "int8", fraction, pattern) for fraction in (1.0, 0.0)]
    packed, dense = (roofline.gemm_time(gpu("A100"), 1, layer).seconds for layer in few)
    assert packed / dense == pytest.approx(share, rel=1e-2)
    layer = LinearShape(65536, 65536, "int8", 1.0, pattern)
    assert roofline.decode_ceiling(gpu("A100"), [layer], 1, 0, 0).weight_bytes == share * 65536**2


def test_gemm_is_bound_by_memory_at_one_token_and_by_math_at_many() -> None:
    card = gpu("H100")
    one, many = (roofline.gemm_time(card, tokens, LinearShape(8192, 8192, "fp8")) for tokens in (1, 16384))
    assert (one.bound, many.bound) == ("memory", "math")
    launch = card.launch_us * 1e-6
    assert one.seconds == pytest.approx(launch + (8192 * 8192 + 8192 + 2 * 8192) / 3350e9)
    assert many.seconds == pytest.approx(launch + 2 * 16384 * 8192 * 8192 / 1978.9e12)


@pytest.mark.parametrize("card", list(roofline.gpus()))
def test_no_kernel_takes_less_than_a_launch_and_a_wave(card: str) -> None:
    """The smallest GEMM that is worth launching takes over a microsecond; 2:4 of a small weight gains nothing."""
    least = gpu(card).least_kernel_seconds
    assert 1e-6 < least < 3e-6
    dense = roofline.gemm_time(gpu(card), 1, LinearShape(256, 256, "int8"))
    assert (dense.seconds, dense.bound) == (pytest.approx(least), "launch")
    if gpu(card).sparse_multiplier > 1:
        assert roofline.gemm_time(gpu(card), 1, LinearShape(256, 256, "int8", 1.0)).seconds == dense.seconds


def test_small_layers_gain_no_time_in_a_whole_model() -> None:
    small = [LinearShape(256, 256, "fp8")] * 42, [LinearShape(256, 256, "fp8", 1.0)] * 42
    dense, built = (roofline.decode_ceiling(gpu("H100"), layers, 1, 16, 512) for layers in small)
    assert dense.bound == built.bound == "launch"
    assert dense.seconds == built.seconds
    assert built.weight_bytes == 0.625 * dense.weight_bytes


def test_2_of_4_doubles_the_math_peak() -> None:
    shapes = (LinearShape(8192, 8192, "bf16", fraction) for fraction in (0.0, 1.0))
    dense, sparse = (roofline.gemm_time(gpu("A100"), 32768, layer) for layer in shapes)
    assert dense.bound == sparse.bound == "math"
    assert dense.seconds / sparse.seconds == pytest.approx(2, rel=1e-3)


@given(
    card=st.sampled_from(["a100-80gb-sxm", "h100-sxm", "h200", "l40s", "b200", "rtx-4090"]),
    format=st.sampled_from(["bf16", "fp16", "int8"]),
    tokens=st.integers(1, 65536),
    shape=st.tuples(st.integers(16, 32768), st.integers(16, 32768)),
)
def test_2_of_4_never_gains_more_than_its_bytes_or_twice_the_math(
    card: str, format: str, tokens: int, shape: tuple[int, int]
) -> None:
    weights = [LinearShape(*shape, format, fraction) for fraction in (0.0, 1.0)]
    dense, sparse = (roofline.gemm_time(gpu(card), tokens, layer) for layer in weights)
    assert 1 <= dense.seconds / sparse.seconds <= 2 + 1e-9
    assert dense.flops == sparse.flops
    assert roofline.gemm_time(gpu(card), tokens + 1, weights[0]).seconds >= dense.seconds


def test_kv_cache_lowers_the_decode_ceiling() -> None:
    card, layers, kv = gpu("H100"), llama_8b("fp8", sparse=True), 2 * BLOCKS * KEYS * 2
    short, long = (roofline.decode_ceiling(card, layers, 64, context, kv) for context in (128, 4096))
    assert short.seconds is not None
    assert long.seconds is not None
    assert long.seconds - short.seconds == pytest.approx(64 * (4096 - 128) * kv / 3350e9)


def test_a_model_that_fits_the_l2_cache_is_not_bound_by_memory() -> None:
    small, large = (
        roofline.decode_ceiling(gpu("H100"), [LinearShape(1024, 1024)] * count, 1, 16, 512) for count in (10, 100)
    )
    assert small.fits_l2
    assert not large.fits_l2


def test_prefill_runs_the_last_token_only_through_lm_head() -> None:
    body = [LinearShape(HIDDEN, HIDDEN, "bf16")] * 32
    ceiling = roofline.prefill_ceiling(gpu("H100"), [*body, HEAD], tokens=2048, batch=4)
    assert ceiling.flops == 32 * 2 * 4 * 2048 * HIDDEN * HIDDEN + 2 * 4 * VOCABULARY * HIDDEN
    assert ceiling.bound == "math"
    assert ceiling.seconds is not None
    assert ceiling.tokens_per_second == pytest.approx(4 * 2048 / ceiling.seconds)


@pytest.mark.parametrize(
    ("name", "format", "sparse", "fragment"),
    [
        ("A100", "fp8", False, "SM89"),
        ("A10", "fp8", True, "SM89"),
        ("T4", "bf16", False, "SM80"),
        ("T4", "int8", True, "sparse tensor cores"),
    ],
)
def test_a_card_refuses_what_it_has_no_tensor_cores_for(name: str, format: str, sparse: bool, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        roofline.gemm_time(gpu(name), 1, LinearShape(64, 64, format, sparse))
    ceiling = roofline.decode_ceiling(gpu(name), [LinearShape(64, 64, format, sparse)], 1, 0, 0)
    assert not ceiling.supported
    assert ceiling.seconds is ceiling.tokens_per_second is None
    assert fragment in str(ceiling.reason)


def test_fp8_needs_sm89_on_every_card_of_the_table() -> None:
    for card in roofline.gpus().values():
        assert ("fp8" in card.dense_tflops) == (card.sm >= 89), card.name
        assert (card.sparse_multiplier > 1) == (card.sm >= 80), card.name
        assert card.dense_tflops["int8"] > card.dense_tflops["fp16"], card.name
        assert card.source, card.name


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H100", "H100 SXM 80GB"),
        ("h100 sxm", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H200", "H200 SXM 141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200 HGX 180GB"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("rtx_4090", "GeForce RTX 4090"),
    ],
)
def test_a_card_is_found_by_the_names_people_and_drivers_use(name: str, card: str) -> None:
    assert gpu(name).name == card


def test_no_two_cards_share_a_name() -> None:
    names = [roofline._plain(n) for key, card in roofline.gpus().items() for n in {key, card.name, *card.aliases}]
    owners = {name: gpu(name).name for name in names}
    for key, card in roofline.gpus().items():
        for name in (key, card.name, *card.aliases):
            assert owners[roofline._plain(name)] == card.name


def test_an_unknown_card_is_quoted_and_the_known_ones_named() -> None:
    with pytest.raises(UserError, match=r"'H900'.*h100-sxm"):
        gpu("H900")


def test_two_kernels_take_two_launches_and_two_waves() -> None:
    """A layer that is 2:4 in part on the torch engine: where launches bound it, it takes longer than dense."""
    card, floor = gpu("H100"), gpu("H100").least_kernel_seconds
    small, large = ((card, 1, LinearShape(size, size, "fp8", 0.5)) for size in (256, 16384))
    assert roofline.gemm_time(*small, kernels=2).seconds == pytest.approx(2 * floor)
    one, two = (roofline.gemm_time(*large, kernels=kernels).seconds for kernels in (1, 2))
    assert two - one == pytest.approx(card.launch_us * 1e-6)
