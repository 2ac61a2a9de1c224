"""The second moments that a solver sees: against the model itself, run whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from calibration.model.activation_file import ActivationFile
from calibration.model.blocks import Blocks, Stream
from calibration.pruning.input_statistics import collect_statistics

TOKENS = torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(0))
HIDDEN, INNER = 32, 42  # 42 inputs do not divide into the parts that a sum is computed in


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blocks, Stream, Stream]:
    """A block, biases in its attention, as pruned so far and dense, and the states that enter it."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, attention_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    blocks = Blocks(directory)
    streams = []
    for form in ("pruned", "dense"):
        states = ActivationFile(directory / f"{form}.states", (*TOKENS.shape, HIDDEN))
        states.write([torch.randn(*TOKENS.shape, HIDDEN)])
        streams.append(Stream(blocks.load(0), states))
    return blocks, streams[0], streams[1]


@torch.no_grad()
def through_attention(blocks: Blocks, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """The states before, what o_proj reads, and the states after: [tokens, features]."""
    seen: list[Tensor] = []
    attention = stream.block.self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    state = stream.states.read(range(len(TOKENS)))
    added = attention(hidden_states=stream.block.input_layernorm(state), **blocks.arguments(TOKENS.shape[1])[0])[0]
    handle.remove()
    return state.flatten(0, 1), seen[0].flatten(0, 1), (state + added).flatten(0, 1)


@torch.no_grad()
def test_moments_of_a_layer_that_adds_to_the_residual_stream(block: tuple[Blocks, Stream, Stream], tmp_path: Path):
    blocks, pruned, dense = block
    arguments = blocks.arguments(TOKENS.shape[1])[0]
    inputs, leaving = (ActivationFile(tmp_path / name, (*TOKENS.shape, HIDDEN)) for name in ("inputs", "leaving"))
    actual = collect_statistics("self_attn.o_proj", pruned, arguments, dense, inputs, leaving)

    before, x, _ = through_attention(blocks, pruned)
    after = through_attention(blocks, dense)[2]
    missing = after - before - pruned.block.self_attn.o_proj.bias
    assert actual.cross is None
    torch.testing.assert_close(actual.hessian, x.T @ x / len(x))
    torch.testing.assert_close(actual.residual_cross, missing.T @ x / len(x))
    torch.testing.assert_close(inputs.read(range(len(TOKENS))).flatten(0, 1), x)
    torch.testing.assert_close(leaving.read(range(len(TOKENS))).flatten(0, 1), after)


@torch.no_grad()
def test_moments_of_a_layer_inside_a_half(block: tuple[Blocks, Stream, Stream]):
    blocks, pruned, dense = block
    arguments = blocks.arguments(TOKENS.shape[1])[0]
    actual = collect_statistics("mlp.up_proj", pruned, arguments, dense)
    x, dense_x = (
        stream.block.post_attention_layernorm(stream.states.read(range(len(TOKENS)))).flatten(0, 1)
        for stream in (pruned, dense)
    )
    assert actual.residual_cross is None
    torch.testing.assert_close(actual.hessian, x.T @ x / len(x))
    torch.testing.assert_close(actual.cross, dense_x.T @ x / len(x))


@torch.no_grad()
def test_a_hessian_of_a_width_that_does_not_divide_into_parts_is_whole(block: tuple[Blocks, Stream, Stream]):
    blocks, pruned, _ = block
    actual = collect_statistics("mlp.down_proj", pruned, blocks.arguments(TOKENS.shape[1])[0]).hessian
    assert actual.shape == (INNER, INNER)
    mlp = pruned.block.mlp
    normed = pruned.block.post_attention_layernorm(pruned.states.read(range(len(TOKENS)))).flatten(0, 1)
    x = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    torch.testing.assert_close(actual, x.T @ x / len(x))
    torch.testing.assert_close(actual, actual.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_in_the_dtype_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    states_BTD = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    kept = ActivationFile(tmp_path / "states", states_BTD.shape, dtype=dtype)
    kept.write(states_BTD.split(2))
    assert kept.path.stat().st_size == states_BTD.numel() * dtype.itemsize
    assert torch.equal(kept.read([2, 0]), states_BTD[[2, 0]].to(dtype))
