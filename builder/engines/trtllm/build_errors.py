"""What a failed TensorRT-LLM build log means, in one line with the next step."""

from __future__ import annotations

import re

# The first that matches anywhere in the log is the cause; what follows it is only its consequence.
CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"(?P<what>out of memory|OutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|Cuda Runtime \(out of memory\))",
        "the GPU ran out of memory: lower engine.max_batch_size, engine.max_num_tokens or engine.max_seq_len, or split "
        "the model with engine.tensor_parallel",
    ),
    (
        r"(could not find plugin:?|could not find plugin creator|Cannot find plugin:?) *(?P<what>[\w:]+)",
        "a plugin library is missing: start it through the artifact's launch files, which preload the library",
    ),
    (
        r"(?P<what>SmoothQuant is not supported on SM\s*>=\s*100)",
        "TensorRT-LLM builds no SmoothQuant INT8 on this GPU: use quantization.format=fp8",
    ),
    (
        r"(Unsupported model architecture: |KeyError: ')(?P<what>\w+(ForCausalLM|LMHeadModel))",
        "this TensorRT-LLM release does not support the architecture: use the container in lock.json",
    ),
    (
        r"(?P<what>Required but not provided tensors.{0,120})",
        "the checkpoint lacks tensors that this release needs: export it again",
    ),
    (
        r"(?P<what>unexpected keyword argument '\w+'|Extra inputs are not permitted.{0,80})",
        "the checkpoint's config.json has a key that this release lacks: export it with nvidia-modelopt 0.47",
    ),
    (
        r"(?P<what>(incompatible device|different compute capability|generated on an incompatible).{0,80})",
        "the engine is for another GPU: build it on this one",
    ),
    (
        r"ModuleNotFoundError: No module named '(?P<what>[\w.]+)'",
        "a Python package is missing in this environment: use the container in lock.json, with twofour installed",
    ),
    (r"(?P<what>No space left on device)", "the disk is full: free space and run again"),
)
_SOURCE_LINE = re.compile(r'^ *File ".*\n(?: {4,}.*\n)*', re.MULTILINE)  # a traceback quotes code, not what happened
_CAUSES = tuple((re.compile(pattern), cause) for pattern, cause in CAUSES)
_ERROR = re.compile(r"\[E\]|\bERROR\b|error:|\w*(Error|Exception)\b")


def explain(log: str) -> str:
    """The cause in one line: a known one, else the first line that looks like an error, else the last line."""
    log = _SOURCE_LINE.sub("", log)
    matches = [(hit.start(), hit, cause) for pattern, cause in _CAUSES if (hit := pattern.search(log))]
    if matches:
        _, hit, cause = min(matches, key=lambda match: match[0])
        return f"'{' '.join(hit['what'].split())}': {cause}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    shown = next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "it wrote nothing")
    return f"'{shown[:200]}'"
