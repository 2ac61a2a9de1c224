"""Holds our code against a real TensorRT-LLM, on CPU tensors: one line a check.

    python tests/upstream/conformance.py DIRECTORY

DIRECTORY holds `tensorrt_llm/`: a source tree, or the site-packages of an installation. What is compiled, or not
installed here, is stubbed (stubs.py) and named at the end. The exit status is 1 where a check failed.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import stubs  # noqa: E402

from tests.support.contract import RELEASES, facts  # noqa: E402


class FailedError(Exception):
    """What is wrong, in one line."""


class NotApplicableError(Exception):
    """Why a check does not apply."""


def require(right: bool, problem: str) -> None:
    if not right:
        raise FailedError(problem)


def version(tree: Path) -> str:
    text = (tree / "tensorrt_llm" / "version.py").read_text()
    return re.findall(r'__version__ = "([^"]+)"', text)[-1]


def release_of(number: str) -> str:
    """The release of the contract that a version belongs to; the last one for what is newer."""
    major_minor = ".".join(number.split(".")[:2])
    return next((name for name in RELEASES if name.removesuffix("rc") == major_minor), RELEASES[-1])


# -- what can be read without importing anything


def serve_options(tree: Path) -> tuple[set[str], set[str]]:
    """(option names, --backend choices) of trtllm-serve, from the decorators of its functions."""
    names: set[str] = set()
    backends: set[str] = set()
    for node in ast.walk(ast.parse((tree / "tensorrt_llm" / "commands" / "serve.py").read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name != "serve":
            continue
        for call in (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)):
            flags = [a.value for a in call.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]
            names.update(flags)
            if "--backend" in flags:
                backends |= {n.value for n in ast.walk(call) if isinstance(n, ast.Constant)} & {
                    "pytorch", "tensorrt", "trt", "_autodeploy"
                }  # fmt: skip
    return names, backends


def check_serve(tree: Path, backend: str) -> str:
    from builder.config import EngineConfig
    from builder.engines.trtllm import pytorch, tensorrt

    names, backends = serve_options(tree)
    require(bool(names), "no options were found in commands/serve.py")
    if backend == "tensorrt" and not backends & {"trt", "tensorrt"}:
        raise NotApplicableError("this release serves no TensorRT engines")
    fragment = tensorrt._serve(EngineConfig()) if backend == "tensorrt" else pytorch._serve(EngineConfig(), sparse=True)
    asked = [word for word in fragment if word.startswith("--")]
    require(set(asked) <= names, f"trtllm-serve has no {sorted(set(asked) - names)}")
    choice = fragment[fragment.index("--backend") + 1]
    require(choice in backends, f"--backend takes {sorted(backends)}, not {choice}")
    return f"{' '.join(asked)}, --backend {choice}"


def check_contract(tree: Path) -> str:
    names, backends = serve_options(tree)
    names |= {f"--backend {choice}" for choice in backends}
    known = set(facts("trtllm-serve", release_of(version(tree))))
    require(known - {"--log_level"} <= names, f"the contract names what is not there: {sorted(known - names)}")
    return f"{len(known)} options of {release_of(version(tree))} are there"


def check_triton(tree: Path) -> str:
    from builder.config import DeployConfig
    from builder.deploy.trtllm_repository import holes

    folder = tree / "triton_backend" / "all_models" / "inflight_batcher_llm"
    if not folder.is_dir():
        raise NotApplicableError("the directory has no triton_backend/all_models/inflight_batcher_llm")
    texts = [re.sub(r"#.*", "", path.read_text()) for path in folder.glob("*/config.pbtxt")]
    filled = set(holes({"max_batch_size": 8}, True, DeployConfig())) | {"engine_dir", "tokenizer_dir"}
    named = set(re.findall(r"\$\{(\w+)\}", "".join(texts)))
    outside = set(re.findall(r"\$\{(\w+)\}", "".join(re.sub(r'"[^"]*"', "", text) for text in texts)))
    require(filled <= named, f"the templates have no {sorted(filled - named)}")
    require(outside <= filled, f"these holes stay open outside of strings: {sorted(outside - filled)}")
    return f"{len(filled)} holes are filled, none stays open outside of strings"


# -- the real classes


def check_llm_args(tree: Path, backend: str) -> str:
    from tensorrt_llm.llmapi import llm_args

    from builder.config import EngineConfig
    from builder.engines.trtllm import artifact

    name = "TorchLlmArgs" if backend == "pytorch" else "TrtLlmArgs"
    if not hasattr(llm_args, name):
        raise NotApplicableError(f"this release has no {name}")
    config = EngineConfig(cuda_graphs=False, chunked_prefill=True, kv_cache_block_reuse=False)
    args = getattr(llm_args, name)(model="/engine", **artifact.llm_args(config, backend, "fp8"))
    require(args.kv_cache_config.enable_block_reuse is False, "enable_block_reuse did not arrive")
    require(args.max_num_tokens == config.max_num_tokens, "max_num_tokens did not arrive")
    return f"{name} takes every key of llm_args.yaml"


def check_build_config(tree: Path) -> str:
    import tensorrt_llm.llmapi.llm_args  # noqa: F401  first, or it and the builder import each other
    from tensorrt_llm.builder import BuildConfig

    from builder.config import EngineConfig
    from builder.engines.trtllm import checkpoint, tensorrt
    from tests.support.stand_in_checkpoint import LAYERS, write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        settings = tensorrt.build_config(
            checkpoint.read(write_checkpoint(Path(folder))), EngineConfig(), dict.fromkeys(LAYERS, "native")
        )
    built = BuildConfig.from_dict(dict(settings)) if hasattr(BuildConfig, "from_dict") else BuildConfig(**settings)
    require(built.weight_sparsity is True, "weight_sparsity did not arrive")
    require(built.plugin_config.gemm_plugin is None, "gemm_plugin did not arrive")
    return f"BuildConfig takes {len(settings)} settings and {len(settings['plugin_config'])} of its PluginConfig"


def check_pretrained_config(tree: Path) -> str:
    import tensorrt_llm.llmapi.llm_args  # noqa: F401
    from tensorrt_llm.models.llama.config import LLaMAConfig
    from tensorrt_llm.models.qwen.config import QWenConfig

    from calibration.quantization.trtllm_config import complete_config
    from tests.support.stand_in_checkpoint import CONFIG

    classes = {"LlamaForCausalLM": LLaMAConfig, "MistralForCausalLM": LLaMAConfig} | dict.fromkeys(
        ("Qwen2ForCausalLM", "Qwen3ForCausalLM"), QWenConfig
    )
    hf = {"rope_theta": 500000.0, "rope_scaling": None}
    for architecture, cls in classes.items():
        plain = {key: value for key, value in CONFIG.items() if key != "rotary_base"} | {"architecture": architecture}
        config = cls(**complete_config(hf, plain))
        require(config.rotary_base == 500000.0, f"{architecture}: rotary_base did not arrive")
        require(config.quantization.quant_algo == "FP8", f"{architecture}: quant_algo did not arrive")
    return f"{', '.join(classes)} take config.json"


def check_module(tree: Path, fp8: bool) -> str:
    import sparse_module

    return sparse_module.check(fp8, require)


CHECKS: tuple[tuple[str, Callable[..., str], tuple[Any, ...]], ...] = (
    ("contract", check_contract, ()),
    ("trtllm-serve, pytorch engine", check_serve, ("pytorch",)),
    ("trtllm-serve, tensorrt engine", check_serve, ("tensorrt",)),
    ("Triton's templates", check_triton, ()),
    ("llm_args.yaml, pytorch engine", check_llm_args, ("pytorch",)),
    ("llm_args.yaml, tensorrt engine", check_llm_args, ("tensorrt",)),
    ("BuildConfig", check_build_config, ()),
    ("PretrainedConfig", check_pretrained_config, ()),
    ("sparse layers, bf16", check_module, (False,)),
    ("sparse layers, FP8", check_module, (True,)),
)


def main(tree: Path) -> int:
    if not (tree / "tensorrt_llm" / "version.py").is_file():
        sys.exit(f"'{tree}' contains no tensorrt_llm/version.py: give a source tree, or site-packages")
    os.environ["TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL"] = "1"
    number, failed = version(tree), 0
    print(f"TensorRT-LLM {number}, held against the facts of {release_of(number)}")
    finder = stubs.install(tree)
    for name, check, arguments in CHECKS:
        try:
            print(f"ok    {name}: {check(tree, *arguments)}")
        except NotApplicableError as reason:
            print(f"skip  {name}: {reason}")
        except Exception as error:
            failed += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, FailedError) else f" ({at.filename}:{at.lineno})"
            print(f"FAIL  {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}{where}")
    print(f"stubbed: {', '.join(sorted(finder.stubbed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
