"""The contents and inputs of a build: an in-toto Statement v1 with a SLSA Provenance v1 predicate, unsigned.

    https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    https://slsa.dev/spec/v1.0/provenance

The subjects are all files of the build, by sha256; tools that sign or check such statements can read it as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from builder.artifacts.cache import CachedOutput
from builder.artifacts.filesystem import sha256_tree
from plugins.common.files import sha256
from plugins.common.json_files import read_json, write_json

MANIFEST = "manifest.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:twofour:build:v1"


def make_manifest(
    subjects: Mapping[str, str],
    *,
    recipe: Mapping[str, Any],
    tools: Mapping[str, str],
    gpu: Mapping[str, Any] | None,
    sources: Mapping[str, str],
    stages: Sequence[CachedOutput],
    started: str,
    finished: str,
) -> dict[str, Any]:
    """The manifest of a build.

    `subjects` are sha256 by path in the build; `sources` are sha256 by name of what went in (model, calibration);
    `tools` are versions by name, `started` and `finished` times as in RFC 3339.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe},
                "internalParameters": {"gpu": gpu},
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": sources[name]}} for name in sorted(sources)
                ],
            },
            "runDetails": {
                "builder": {"id": "urn:twofour:builder", "version": dict(sorted(tools.items()))},
                "metadata": {"startedOn": started, "finishedOn": finished},
                "byproducts": [_stage(entry) for entry in stages],
            },
        },
    }


def as_bytes(value: Any) -> bytes:
    """A JSON file's content, for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def now() -> str:
    """The time as in RFC 3339, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _stage(entry: CachedOutput) -> dict[str, Any]:
    annotations = {"key": entry.record["key"], "seconds": entry.record["seconds"], "reused": entry.reused}
    return {"name": entry.record["stage"], "digest": {"sha256": entry.digest}, "annotations": annotations}


def read_manifest(build: Path) -> dict[str, Any] | None:
    """The build's manifest, or None where there is none of our type."""
    try:
        manifest = read_json(build / MANIFEST)
        ours = manifest["predicate"]["buildDefinition"]["buildType"] == BUILD_TYPE
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours else None


def is_build(directory: Path) -> bool:
    """Whether `directory` is a build of ours."""
    return read_manifest(directory) is not None


def source_digest(build: Path, source: str) -> str | None:
    """The sha256 of what went into a build under this name, such as "model"; None if it does not record one."""
    try:
        listed = (read_manifest(build) or {})["predicate"]["buildDefinition"]["resolvedDependencies"]
        return next((str(each["digest"]["sha256"]) for each in listed if each["name"] == source), None)
    except (KeyError, TypeError):
        return None


def listed_files(build: Path) -> set[str]:
    """The paths of the files that the build's manifest lists."""
    return set(_subjects(read_manifest(build) or {}))


def record_folder(build: Path, folder: str) -> None:
    """Brings the manifest's subjects up to date after a later command wrote `folder` into a finished build."""
    manifest = read_manifest(build)
    assert manifest is not None, f"'{build}' is not a build"
    kept = {name: digest for name, digest in _subjects(manifest).items() if not name.startswith(f"{folder}/")}
    added = {f"{folder}/{name}": digest for name, digest in sha256_tree(build / folder).items()}
    subjects = {**kept, **added}
    manifest["subject"] = [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)]
    write_json(build / MANIFEST, manifest, 2)


def verify_manifest(build: Path, within: str = "") -> list[str]:
    """Missing, changed and unlisted files of a build, a line each; empty without any.

    `within` (such as "checkpoint/") looks only at the files under that folder.
    """
    manifest = read_manifest(build)
    if manifest is None:
        return [f"'{build}' holds no {MANIFEST} of a build"]
    if manifest.get("_type") != STATEMENT_TYPE or manifest.get("predicateType") != PREDICATE_TYPE:
        return [f"{MANIFEST} is not an in-toto statement with a SLSA predicate"]
    subjects = {name: digest for name, digest in _subjects(manifest).items() if name.startswith(within)}
    problems = []
    for name, digest in sorted(subjects.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            problems.append(f"'{name}' leads out of the build")
        elif not (build / name).is_file():
            problems.append(f"'{name}' is missing")
        elif sha256(build / name) != digest:
            problems.append(f"'{name}' changed: its sha256 is not the manifest's")
    present = {path.relative_to(build).as_posix() for path in (build / within).rglob("*") if path.is_file()}
    unlisted = sorted(name for name in present - subjects.keys() - {MANIFEST} if "__pycache__" not in name)
    return problems + [f"'{name}' is not in the manifest" for name in unlisted]


def _subjects(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Name -> sha256; a subject of another form counts as one that nothing can match."""
    listed = manifest.get("subject")
    subjects = {}
    for subject in listed if isinstance(listed, list) else []:
        if isinstance(subject, dict) and isinstance(subject.get("name"), str):
            digest = subject.get("digest")
            subjects[subject["name"]] = str(digest.get("sha256")) if isinstance(digest, dict) else ""
    return subjects
