"""The torch engine as its users see it: the same tokens alone, in any batch, and from transformers itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from builder.engines.request import Request, Token
from builder.engines.torch_backend import artifact, weights
from builder.engines.torch_backend.artifact import Limits, TorchEngine
from builder.engines.torch_backend.cuda_graphs import DecodeSteps
from builder.planning.kv_cache import BLOCK
from plugins.common.errors import UserError

ROOT = Path(__file__).parents[3]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"rope_parameters": YARN}),
}


def make_model(family: str, directory: Path) -> transformers.PreTrainedModel:
    """A random model of the family, saved as Hugging Face has it."""
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | extra)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, SIZES["vocab_size"], (length,), generator=generator).tolist())


def collect(engine: TorchEngine, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for token in engine.generate(requests):
        tokens.setdefault(token.request_id, []).append(token.token)
    return tokens


def requests_of_all_kinds(count: int) -> list[Request]:
    """Prompts of 1 to 20 tokens, 1 to 12 new ones, greedy and sampled."""
    kinds = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.5, "top_k": 7}, {"temperature": 1.0, "top_p": 0.7}]
    return [
        Request(f"r{i}", prompt(1 + 7 * i % 20, seed=i), 1 + 5 * i % 12, ignore_eos=i % 2 == 0, **kinds[i % 4])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model("llama", directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Logits of whole sequences, and greedy tokens through prefill, cache and batched decode, in float64."""
    model = make_model(family, tmp_path).double()
    engine = artifact.load_hf(tmp_path, dtype=torch.float64)
    ids = torch.tensor([prompt(20, 1), prompt(20, 2)])
    with torch.inference_mode():
        torch.testing.assert_close(engine.logits(ids), model(ids).logits.float(), rtol=1e-4, atol=1e-4)
    requests = [Request(str(n), prompt(n, seed=n), 15, ignore_eos=True) for n in (1, 4, 11, 30)]
    tokens = collect(engine, requests)
    for request in requests:
        start = torch.tensor([request.input_ids])
        with torch.inference_mode():
            whole = model.generate(start, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens[request.id] == whole[0, start.shape[1] :].tolist()


def test_dense_model_generates_what_transformers_does(docs_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    engine = artifact.load_hf(docs_llama, dtype=torch.float32)
    start = tuple(range(300, 340))
    with torch.inference_mode():
        whole = model.generate(torch.tensor([start]), max_new_tokens=40, do_sample=False)
    assert collect(engine, [Request("a", start, 40)])["a"] == whole[0, len(start) :].tolist()


@pytest.mark.parametrize("chunked", [False, True])
def test_tokens_do_not_depend_on_the_batch(tiny: Path, chunked: bool) -> None:
    """Few rows, few tokens a prefill, requests that come and go: each gets what it gets alone."""
    requests = requests_of_all_kinds(17)
    wide = artifact.load_hf(tiny, dtype=torch.float64)
    alone = {request.id: collect(wide, [request])[request.id] for request in requests}
    tight = {"max_batch_size": 3, "max_num_tokens": 6 if chunked else 20, "chunked_prefill": chunked}
    crowded = artifact.load_hf(tiny, dtype=torch.float64, **tight)
    assert collect(crowded, requests) == alone
    assert collect(wide, requests) == alone
    assert not crowded.busy


@pytest.fixture(scope="module")
def long(tiny: Path) -> Path:
    """`tiny` with positions for several blocks of the KV cache."""
    out = tiny.parent / "long"
    shutil.copytree(tiny, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4 * BLOCK}))
    return out


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_preemption_changes_no_token(long: Path, chunked: bool, reuse: bool) -> None:
    """Five sequences of up to 3 blocks share 4 blocks."""
    requests = [Request(str(i), prompt(BLOCK - 20 + 9 * i, seed=i), BLOCK + 20, ignore_eos=True) for i in range(5)]
    limits = {"max_batch_size": 4, "max_seq_len": 3 * BLOCK, "chunked_prefill": chunked, "max_num_tokens": 2 * BLOCK}
    roomy = artifact.load_hf(long, dtype=torch.float64, **limits)
    each = roomy.describe()["kv_cache_bytes"] // (4 * 3 + 1)  # a block; one more takes what padded rows write
    tight = artifact.load_hf(long, dtype=torch.float64, **limits, kv_cache_memory=4 * each, kv_cache_block_reuse=reuse)
    assert tight.describe()["kv_cache_tokens"] == 4 * BLOCK
    assert collect(tight, requests) == collect(roomy, requests)
    assert tight.describe()["preemptions"] > 0
    assert tight.describe()["kv_cache_blocks_used"] == roomy.describe()["preemptions"] == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_a_prefix_read_from_the_cache_changes_no_token(long: Path, graphs: bool) -> None:
    """Of six prompts two begin with a block that lies in the cache when they start; one token is always computed."""
    whole = prompt(BLOCK + 8)
    prompts = [whole, (*whole[: BLOCK + 3], 7, 8), whole[:BLOCK], whole[: BLOCK + 1], prompt(20, seed=3), whole]
    requests = [Request(str(i), p, 20, ignore_eos=True) for i, p in enumerate(prompts)]
    tokens, reused = [], []
    for reuse in (True, False):
        engine = artifact.load_hf(long, dtype=torch.float64, max_batch_size=2, kv_cache_block_reuse=reuse)
        if graphs:
            engine._graphs = DecodeSteps(engine.model, engine._cache, 2, 4 * BLOCK)
        tokens.append(collect(engine, requests))
        reused.append(engine.describe()["kv_cache_reused_tokens"])
        assert engine.describe()["kv_cache_blocks_used"] == 0
    assert tokens[0] == tokens[1]
    assert reused[0] == 2 * BLOCK
    assert reused[1] == 0


def test_requests_may_join_while_others_run(tiny: Path) -> None:
    requests = requests_of_all_kinds(9)
    engine = artifact.load_hf(tiny, dtype=torch.float64, max_batch_size=4)
    alone = {request.id: collect(engine, [request])[request.id] for request in requests}
    waiting, tokens = list(requests), []
    while waiting or engine.busy:
        if waiting:
            engine.add(waiting.pop())
        tokens += engine.step()
    joined: dict[str, list[int]] = {}
    for token in tokens:
        joined.setdefault(token.request_id, []).append(token.token)
    assert joined == alone


@pytest.mark.parametrize("budget", [4, 60])
def test_decode_steps_of_fixed_shape_change_no_token(tiny: Path, budget: int) -> None:
    """What CUDA graphs replay, here without the graph: padded rows beside a half prefilled prompt, rounded lengths."""
    requests = requests_of_all_kinds(13)
    settings = {"max_batch_size": 5, "max_num_tokens": budget, "chunked_prefill": True}
    engine = artifact.load_hf(tiny, dtype=torch.float64, **settings)
    expected = collect(engine, requests)
    engine._graphs = DecodeSteps(engine.model, engine._cache, 5, 64)
    assert collect(engine, requests) == expected
    assert {rows for rows, _ in engine._graphs._steps} == ({1, 2, 4} if budget == 4 else {1, 2, 4, 5})


@pytest.mark.gpu
def test_cuda_graphs_change_no_token(tiny: Path) -> None:
    requests = requests_of_all_kinds(13)
    tokens = []
    for cuda_graphs in (True, False):
        engine = artifact.load_hf(tiny, device="cuda", dtype=torch.float64, max_batch_size=5, cuda_graphs=cuda_graphs)
        tokens.append(collect(engine, requests))
    assert tokens[0] == tokens[1]


def test_tokens_are_numbered_timed_and_ended(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    tokens: list[Token] = list(engine.generate([Request("a", prompt(3), 5, ignore_eos=True)]))
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
    assert [token.last for token in tokens] == [False] * 4 + [True]
    assert all(a.time < b.time for a, b in pairwise(tokens))


def test_eos_ends_a_request_unless_ignored(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    free = collect(engine, [Request("a", prompt(3), 9, ignore_eos=True)])["a"]
    engine.eos = frozenset({free[4]})
    stopped = free[: free.index(free[4]) + 1]
    assert collect(engine, [Request("a", prompt(3), 9)])["a"] == stopped
    assert collect(engine, [Request("a", prompt(3), 9, ignore_eos=True)])["a"] == free


def test_a_cancelled_request_leaves_the_others_alone(tiny: Path) -> None:
    engine = artifact.load_hf(tiny, dtype=torch.float64, max_batch_size=3)
    requests = [Request(str(i), prompt(5 + i, seed=i), 10, ignore_eos=True) for i in range(5)]
    alone = {request.id: collect(engine, [request])[request.id] for request in requests}
    for request in requests:
        engine.add(request)
    tokens = engine.step() + engine.step()
    for name in ("0", "4", "unknown"):  # one running in the first row, one waiting, one never seen
        engine.cancel(name)
    while engine.busy:
        tokens += engine.step()
    for name in ("1", "2", "3"):
        assert [token.token for token in tokens if token.request_id == name] == alone[name]
    assert not [token for token in tokens if token.request_id == "4"]


def test_an_abandoned_generation_leaves_nothing_behind(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    for _ in engine.generate(requests_of_all_kinds(4)):
        break
    assert not engine.busy


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("x", (), 1), "has no tokens"),
        (Request("x", (5,), 0), "asks for 0 tokens"),
        (Request("x", (5,) * 60, 5), "60 \\+ 5 tokens, more than max_seq_len 64"),
        (Request("x", (5,) * 30, 5), "30 tokens, more than max_num_tokens 20"),
        (Request("x", (5, 96), 5), "outside 0 to 95"),
        (Request("x", (5, -1), 5), "outside 0 to 95"),
        (Request("x", (5,), 5, temperature=-1), "temperature -1"),
        (Request("x", (5,), 5, temperature=float("nan")), "temperature nan"),
        (Request("x", (5,), 5, top_p=0), "top_p 0"),
        (Request("taken", (5,), 5), "an id of its own"),
    ],
)
def test_a_request_that_cannot_run_is_refused(tiny: Path, request_: Request, words: str) -> None:
    engine = artifact.load_hf(tiny, max_num_tokens=20)
    engine.add(Request("taken", (5,), 5))
    with pytest.raises(UserError, match=words) as error:
        engine.add(request_)
    assert f"'{request_.id}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_logits_past_max_seq_len_are_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="65 tokens exceeds max_seq_len 64"):
        artifact.load_hf(tiny).logits(torch.zeros(1, 65, dtype=torch.int64))


def sparse_checkpoint(tiny: Path, out: Path) -> Path:
    """A copy of the tiny model whose MLP weights are 2:4 and declared so."""
    shutil.copytree(tiny, out)
    tensors = load_file(out / "model.safetensors")
    layers = [name.removesuffix(".weight") for name in tensors if ".mlp." in name and name.endswith(".weight")]
    for layer in layers:
        groups = tensors[f"{layer}.weight"].view(-1, 4)
        groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    declared = {"pattern": "2:4", "method": "magnitude", "layers": layers}
    (out / "sparsity.json").write_text(json.dumps(declared))
    return out


def test_built_engine_is_the_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, and in several shards."""
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    dense = artifact.load_hf(checkpoint)
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    artifact.build(checkpoint, tmp_path / "engine", Limits(max_batch_size=2), {"layers": {}})
    assert len(list((tmp_path / "engine").glob("model-0000?-of-0000?.safetensors"))) > 1
    engine = artifact.load(tmp_path / "engine")
    ids = torch.tensor([prompt(40)])
    assert torch.equal(engine.logits(ids), dense.logits(ids))
    assert json.loads((tmp_path / "engine" / "tactics.json").read_text()) == {"layers": {}}
    names = set(weights.Tensors(tmp_path / "engine"))
    assert "model.layers.0.mlp.up_proj.weight_values" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names


def test_building_twice_writes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    for name in "ab":
        artifact.build(checkpoint, tmp_path / name, Limits())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:7] = 1
    save_file(tensors, directory / "model.safetensors")


def declare_missing(directory: Path) -> None:
    change_json(directory / "sparsity.json", layers=["model.layers.9.mlp.up_proj"])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001.safetensors")
    (directory / weights.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (break_weight, "'model.layers.1.mlp.up_proj.weight' is declared 2:4, but row 3, group 1 "),
        (declare_missing, "declares 'model.layers.9.mlp.up_proj'"),
        (pickle_only, "pickled weights are never loaded"),
        (truncate, "model.safetensors' cannot be read"),
        (lose_shard, "names 'model-00002.safetensors', which is missing"),
        (lambda d: (d / "sparsity.json").write_text("{}"), "it does not say"),
        (lambda d: (d / "config.json").unlink(), "it holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (
            lambda d: change_json(d / "config.json", architectures=["GptOssForCausalLM"]),
            "'GptOssForCausalLM', not supp",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(attack, words: str, tiny: Path, tmp_path: Path) -> None:
    checkpoint = sparse_checkpoint(tiny, tmp_path / "checkpoint")
    attack(checkpoint)
    with pytest.raises(UserError, match=words) as error:
        artifact.build(checkpoint, tmp_path / "engine", Limits())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "engine" / "engine.json").exists()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda d: shutil.rmtree(d), "is not an engine directory: it holds no engine.json"),
        (lambda d: change_json(d / "engine.json", backend="tensorrt"), "engine of backend 'tensorrt'"),
        (lambda d: change_json(d / "engine.json", layout=99), "layout 99, and this twofour reads 2: build"),
        (lambda d: (d / "engine.json").write_text('{"backend": "torch", "layout": 2}'), "lacks 'max_batch_size'"),
        (lambda d: change_json(d / "config.json", intermediate_size=64), "config.json says \\[64, 32\\]"),
        (lambda d: change_json(d / "config.json", num_hidden_layers=4), "no tensor 'model.layers.3.self_attn.q_proj"),
        (lambda d: change_json(d / "config.json", vocab_size=95), "'lm_head' has shape \\[96, 32\\]"),
        (
            lambda d: change_json(d / "config.json", rope_parameters=YARN | {"rope_type": "dynamic"}),
            "rope_type 'dynamic' is not supported",
        ),
    ],
)
def test_a_foreign_engine_is_refused(attack, words: str, tiny: Path, tmp_path: Path) -> None:
    artifact.build(tiny, tmp_path / "engine", Limits())
    attack(tmp_path / "engine")
    with pytest.raises(UserError, match=words) as error:
        artifact.load(tmp_path / "engine")
    assert "\n" not in str(error.value)


def test_a_config_cannot_name_code_to_run(tiny: Path, tmp_path: Path) -> None:
    """auto_map is what transformers would import remote code by."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('remote code ran')")
    change_json(tmp_path / "model" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    ids = torch.tensor([prompt(5)])
    assert torch.equal(artifact.load_hf(tmp_path / "model").logits(ids), artifact.load_hf(tiny).logits(ids))


def test_the_engine_needs_no_pydantic(tiny: Path) -> None:
    """GPU machines carry torch, transformers and safetensors only."""
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['ml_dtypes'] = sys.modules['modelopt'] = None\n"
        "from pathlib import Path\n"
        "from builder.engines.torch_backend import artifact\n"
        "from builder.engines.request import Request\n"
        f"engine = artifact.load_hf(Path({str(tiny)!r}))\n"
        "print(len(list(engine.generate([Request('a', (3, 4), 3, ignore_eos=True)]))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr
