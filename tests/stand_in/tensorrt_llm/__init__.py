"""STAND-IN for TensorRT-LLM, written for twofour's tests: see tests/stand_in/README.md. Not NVIDIA's package.

A release's folder (releases/1.0, ...) stands before this one on PYTHONPATH and holds only what differs from 1.2, which
is what lies here: each package looks into it first.
"""

from importlib import metadata
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)[::-1]
__version__ = metadata.version("tensorrt_llm")
