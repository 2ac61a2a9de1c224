"""Measured tactics on the machine that runs the engine: reused on the same GPU and libraries, refused on others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from plugins.common.patterns import HYBRID, hybrid_kernel
from plugins.libtwofour import bindings, structures

log = logging.getLogger(__name__)


def apply(tactics: Mapping[str, Any], out: str = "bf16", device: int = 0) -> str | None:
    """Gives libtwofour the algorithms that were chosen when `tactics` were measured, so that nothing is searched again.

    `out` is what the layers put out, "bf16" or "fp16". Only where they were measured on this kind of GPU with these
    libraries; else the libraries' own defaults run, and the result states the reason.
    """
    context = bindings.context(device)
    info = context.info()
    problem = check_device(tactics, torch.cuda.get_device_name(device), info.sm, versions(info))
    if problem is not None:
        return problem
    for layer in tactics["layers"].values():
        format = out if layer["format"] in ("fp16", "bf16") else layer["format"]
        for product, algorithm in _algorithms(layer, format, out):
            try:
                context.set_algorithm(product, algorithm)
            except bindings.LibraryError as error:
                kernel = structures.KERNELS[product.kernel]
                log.info("%s keeps its default algorithm at %d tokens: %s", kernel, product.tokens, error)
    return None


def _algorithms(layer: Mapping[str, Any], format: str, out: str) -> Iterator[tuple[structures.Gemm, tuple[int, ...]]]:
    """Each product of a layer of tactics.json and its algorithm."""
    first, *rest = layer.get("products") or [(layer["out_features"], layer["in_features"])]
    for bucket in layer["buckets"]:
        kernel, tokens = bucket["kernel"].removeprefix("dense-"), bucket["tokens"]
        if bucket.get("algorithm") is not None and kernel in structures.KERNELS:
            (rows, columns), sparse = first, (0, 0)
            if kernel in map(hybrid_kernel, HYBRID):
                (rows, columns), sparse = _in_one(first, rest[0], layer["in_features"])
            yield structures.gemm(kernel, format, out, rows, columns, tokens, sparse=sparse), tuple(bucket["algorithm"])
        if bucket.get("rest_algorithm") is not None:
            rows, columns = rest[0]
            yield structures.gemm("cublaslt", format, out, rows, columns, tokens), tuple(bucket["rest_algorithm"])


def _in_one(sparse: Sequence[int], rest: Sequence[int], in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The whole layer of two products [N, K], and its sparse rows and inputs, one of which is 0."""
    if sparse[1] == in_features:
        return (sparse[0] + rest[0], in_features), (sparse[0], 0)
    return (sparse[0], in_features), (0, sparse[1])


def check_device(tactics: Mapping[str, Any], name: str, sm: int, here: Mapping[str, Any]) -> str | None:
    """Why `tactics` cannot be reused on this GPU with these library versions, or None."""
    device, known = tactics.get("device"), tactics.get("versions", {})
    if tactics.get("source") != "measured" or device is None:
        return "its kernels were chosen by prediction, not measured: build the engine again on this GPU"
    there = f"{device['name']} (SM {device['sm']})" if device["sm"] else device["name"]
    if (device["name"], device["sm"]) != (name, sm):
        return f"its kernels were timed on {there}, and this is {name} (SM {sm}): build the engine again here"
    for library_name in ("libtwofour", "cusparselt", "cublaslt"):
        timed = known.get(library_name)
        if timed != here[library_name]:
            expected = f"{library_name} {timed or 'of an unknown version'}"
            return f"its kernels were timed with {expected}, and here is {here[library_name]}: build the engine again"
    return None


def versions(info: structures.Info) -> dict[str, Any]:
    """What the times depend on besides the GPU."""
    return {
        "libtwofour": bindings.load().twofour_version(),
        "cusparselt": info.cusparselt_version,
        "cublaslt": info.cublaslt_version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
