"""STAND-IN: TensorRT-LLM's logger, which keeps what it was told."""


class Logger:
    def __init__(self):
        self.lines = []

    def set_level(self, level):
        assert level in ("verbose", "info", "warning", "error")

    def info(self, text):
        self.lines.append(f"[TRT-LLM] [I] {text}")

    def warning(self, text):
        self.lines.append(f"[TRT-LLM] [W] {text}")


logger = Logger()
