"""STAND-IN for TensorRT-LLM, written for twofour's tests: see tests/stand_in/README.md. Not NVIDIA's package."""

__version__ = "1.2.1+standin"
