"""python -m benchmarks.pruning.scripts.make_gguf SOURCE OUT

Writes the GGUF file SOURCE again with Q8_0 weights, in the environment that holds llama-cpp-python.
"""

import ctypes
import sys

import llama_cpp


def main(source: str, out: str) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    failed = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings))
    if failed:
        sys.exit(f"llama.cpp could not quantize '{source}': status {failed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
