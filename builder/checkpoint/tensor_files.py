"""Reads the index and the safetensors headers of a checkpoint's files; reports errors of each file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.checkpoint.violations import Code, Report, Violation
from calibration.model.weight_files import INDEX, is_file_name
from plugins.common.json_files import read_json
from plugins.common.safetensors_file import HeaderError, Tensor, read_header


def read_table(path: Path, report: Report) -> dict[str, Any] | None:
    """A JSON table; None where the file is absent, or where it is none, which is reported."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        report(Violation(Code.CONFIG, f"it cannot be read ({' '.join(str(error).split())[:200]})", path.name))
        return None
    if not isinstance(content, dict):
        report(Violation(Code.CONFIG, "it is not a table of keys", path.name))
        return None
    return content


def hf_tensors(directory: Path, report: Report) -> dict[str, Tensor]:
    here = sorted(path.name for path in directory.glob("*.safetensors"))
    index = read_table(directory / INDEX, report)
    if index is None:
        if not here:
            report(Violation(Code.MISSING_FILE, "there is no *.safetensors file", str(directory.name)))
        for name in here[1:]:
            report(Violation(Code.INDEX, f"'{here[0]}' and it lie side by side, with no {INDEX}", name))
        return {name: tensor for file in here[:1] for name, tensor in _header(directory / file, report).items()}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(is_file_name(name) for name in weight_map.values()):
        report(Violation(Code.INDEX, "its weight_map is not a table of tensor and file names", INDEX))
        return {}
    shards = sorted(set(weight_map.values()))
    for name in sorted(set(here) - set(shards)):
        report(Violation(Code.INDEX, f"{INDEX} does not name it", name))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if shard not in here:
            report(Violation(Code.MISSING_FILE, f"it names the shard '{shard}', which is missing", INDEX))
            continue
        for name, tensor in _header(directory / shard, report).items():
            if name in tensors:
                report(Violation(Code.INDEX, f"it is also in '{tensors[name].file.name}'", shard, name))
            elif weight_map.get(name) != shard:
                report(Violation(Code.INDEX, f"{INDEX} places it in {weight_map.get(name)!r}", shard, name))
            tensors.setdefault(name, tensor)
    for name, shard in weight_map.items():
        if name not in tensors and shard in here:
            report(Violation(Code.INDEX, f"{INDEX} names it, and the shard does not hold it", shard, name))
    return tensors


def trtllm_tensors(directory: Path, ranks: int, report: Report) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    files = [f"rank{rank}.safetensors" for rank in range(ranks)]
    for rank, file in enumerate(files):
        if not (directory / file).is_file():
            report(Violation(Code.MISSING_FILE, f"the mapping has {ranks} ranks, and it is missing", file))
            continue
        tensors |= {f"rank{rank}/{name}": tensor for name, tensor in _header(directory / file, report).items()}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in files:
            report(Violation(Code.INDEX, f"the mapping has only {ranks} ranks", path.name))
    return tensors


def _header(path: Path, report: Report) -> dict[str, Tensor]:
    try:
        return read_header(path)
    except HeaderError as error:
        report(Violation(Code.FILE, str(error), path.name))
    except OSError as error:
        report(Violation(Code.FILE, f"it cannot be read ({error.strerror})", path.name))
    return {}
