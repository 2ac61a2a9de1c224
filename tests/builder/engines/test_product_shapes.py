"""The shapes of products that the tuner times."""

from __future__ import annotations

from builder.engines import product_shapes
from plugins.common.linear_shape import LinearShape

DOWN = "model.layers.0.mlp.down_proj"


def plan_layer(name: str, n: int, k: int, format: str = "fp8") -> LinearShape:
    return LinearShape(n, k, format, 1.0, name=name)


def test_shapes_are_those_that_a_rank_multiplies() -> None:
    block = "model.layers.0.self_attn"
    layers = {f"{block}.{name}": plan_layer(f"{block}.{name}", n, 64) for name, n in (("q_proj", 64), ("k_proj", 32))}
    layers |= {f"{block}.v_proj": plan_layer(f"{block}.v_proj", 32, 64, "int8")}
    q = layers[f"{block}.q_proj"]
    assert product_shapes.shape(q, 1, "bfloat16") == LinearShape(64, 64, "fp8")
    assert product_shapes.shape(q, 2, "bfloat16", layers) == LinearShape((64 + 32 + 32) // 2, 64, "fp8")
    assert product_shapes.shape(layers[f"{block}.v_proj"], 1, "float16") == LinearShape(32, 64, "int8")
    assert product_shapes.shape(plan_layer(DOWN, 64, 96, "bf16"), 2, "float16", layers) == LinearShape(64, 48, "fp16")
    del layers[f"{block}.k_proj"]  # one part dense: TensorRT-LLM's product is dense, and each part stands for itself
    assert product_shapes.shape(q, 1, "bfloat16", layers).out_features == 64
