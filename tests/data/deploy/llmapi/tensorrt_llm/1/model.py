"""Ours: a stand-in for TensorRT-LLM's LLM API model. Notes when its engine would start."""

order = []


class TritonPythonModel:
    def initialize(self, args):
        order.append("engine")
