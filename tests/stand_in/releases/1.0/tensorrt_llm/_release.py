"""STAND-IN: which release this is, by its name in tests/data/tensorrt_llm.json."""

RELEASE = "1.0"
