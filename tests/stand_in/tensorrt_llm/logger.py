"""STAND-IN: TensorRT-LLM's logger, which keeps its lines. A level from the environment wins over set_level.

Read in tensorrt_llm/logger.py of NVIDIA/TensorRT-LLM 027cd518e3b63809a5c5799187991e7f1164fb12.
"""

import os

LEVELS = ("internal_error", "error", "warning", "info", "verbose")


class Logger:
    def __init__(self):
        level = os.environ.get("TLLM_LOG_LEVEL")
        self.lines, self._set_from_env = [], level is not None
        self.level = level.lower() if level and level.lower() in LEVELS else "warning"

    def set_level(self, level):
        assert level in LEVELS
        if self._set_from_env:
            self.warning(f"Logger level already set from environment. Discard new verbosity: {level}")
        else:
            self.level = level

    def info(self, text):
        self.lines.append(f"[TRT-LLM] [I] {text}")

    def warning(self, text):
        self.lines.append(f"[TRT-LLM] [W] {text}")


logger = Logger()
