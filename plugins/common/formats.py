"""The number formats of weights, and their names in other libraries. Imports no torch."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """A number format. Its value is our name for it, so that it compares equal to that string."""

    nbytes: int  # of one value
    dtype: str  # in torch, and for 16 and 32 bit in config.json
    safetensors: str
    twofour_type: int | None  # in libtwofour's C interface; None: no kernel of ours takes it
    algorithm: str | None  # in ModelOpt's and TensorRT-LLM's configs; None: not quantized

    FP16 = "fp16", 2, "float16", "F16", 0, None
    BF16 = "bf16", 2, "bfloat16", "BF16", 1, None
    INT8 = "int8", 1, "int8", "I8", 2, "W8A8_SQ_PER_CHANNEL"
    FP8 = "fp8", 1, "float8_e4m3fn", "F8_E4M3", 3, "FP8"
    FP32 = "fp32", 4, "float32", "F32", None, None

    def __new__(
        cls, name: str, nbytes: int, dtype: str, safetensors: str, twofour_type: int | None, algorithm: str | None
    ) -> Format:
        self = str.__new__(cls, name)
        self._value_, self.nbytes, self.dtype, self.safetensors = name, nbytes, dtype, safetensors
        self.twofour_type, self.algorithm = twofour_type, algorithm
        return self

    def __str__(self) -> str:
        return str(self.value)


EIGHT_BIT = (Format.INT8, Format.FP8)  # what quantization makes
INT8_PER_TOKEN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"  # TensorRT-LLM's name of INT8 with a scale for each token
KERNEL_OUTPUTS = (Format.FP16, Format.BF16)  # what our kernels write
FLOATS = (Format.BF16, Format.FP16, Format.FP32)  # what models are stored in

OF_DTYPE: dict[str, str] = {format.dtype: format.value for format in Format}  # torch's name -> ours
OF_SAFETENSORS: dict[str, str] = {format.safetensors: format.value for format in Format}
OF_ALGORITHM: dict[str | None, str] = {None: "none", **{format.algorithm: format.value for format in EIGHT_BIT}}
OF_KV_ALGORITHM: dict[str | None, str] = {None: "none", **{format.name: format.value for format in EIGHT_BIT}}
_BY_NAME = {str(format.value): format for format in Format}


def format_of(name: str) -> Format:
    """The format that we call `name`. Raises KeyError for another name."""
    return _BY_NAME[name]
