"""Stands in for the packages that a TensorRT-LLM source tree needs and this machine lacks: compiled parts, CUDA, MPI.

`install()` adds an import finder that comes last: whatever can be imported for real is. A stub answers every attribute
and every call with another stub, so that modules which only name such things at import time can be imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

COMPILED = ("tensorrt_llm.bindings", "tensorrt_llm.libs", "tensorrt_llm.deep_ep", "tensorrt_llm.deep_gemm",
            "tensorrt_llm.flash_mla", "tensorrt_llm.runtime.kv_cache_manager_v2.rawref._rawref")  # fmt: skip
BARE = ("tensorrt_llm", "tensorrt_llm._torch", "tensorrt_llm._torch.models", "tensorrt_llm.models")
"""Packages whose __init__ imports all of TensorRT-LLM: here they are folders, whose modules are imported one by one."""


class StubType(type):
    """Classes that have every attribute, and whose instances are made of anything."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":  # of a C++ enumeration
            return {}
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return make(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]  # a decorator
        return super().__call__()

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __or__(cls, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __getitem__(cls, key: Any) -> Any:
        return cls


class Stub(metaclass=StubType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return make(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else Stub()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __int__(self) -> int:
        return 0

    def __mod__(self, other: Any) -> int:  # an MPI rank
        return 0

    __index__ = __hash__ = __int__
    __add__ = __sub__ = __floordiv__ = __rmod__ = __mod__

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def make(name: str) -> Any:
    return StubType(name.rpartition(".")[2], (Stub,), {})


class StubModule(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = make(name)
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for what the tree asks for and nobody else has; of the tree itself only for its compiled parts.

    Other packages import optional ones too; those imports must fail.
    """

    def __init__(self, tree: Path) -> None:
        self.tree, self.stubbed = str(tree), set[str]()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        package = name.partition(".")[0]
        if package in ("tensorrt_llm", "plugins") and not name.startswith(COMPILED):
            return None
        if package not in self.stubbed and not name.startswith(COMPILED) and not self.asked_by_the_tree():
            return None
        self.stubbed.add(package)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def asked_by_the_tree(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename.startswith(self.tree)

    def create_module(self, spec: Any) -> ModuleType:
        return StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class Operators:
    """A namespace of torch.ops: the operators that Python defines, and stubs for those of the compiled library."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name) if hasattr(self.real, name) else make(name)


class Folder(ModuleType):
    """A package without its __init__: what it would have re-exported is a stub."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        try:
            return importlib.import_module(f"{self.__name__}.{name}")
        except ImportError:
            return make(name)


def install(tree: Path) -> Finder:
    """Makes `tree`/tensorrt_llm importable with stubs for what is missing."""
    import torch

    if not torch.cuda.is_available():  # as an H100 would answer
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="stub")
        torch.cuda.get_device_properties = lambda device=None: properties
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.cuda.set_device = lambda device: None
    torch.classes.trtllm = SimpleNamespace()  # no C++ class is registered
    for namespace in ("trtllm", "tensorrt_llm"):
        setattr(torch.ops, namespace, Operators(getattr(torch.ops, namespace)))
    torch.compile = lambda function=None, **options: function or (lambda wrapped: wrapped)  # it would look for triton
    finder = Finder(tree)
    sys.meta_path.append(finder)
    for name in BARE:
        package = Folder(name)
        package.__path__ = [str(tree / name.replace(".", "/"))]
        sys.modules[name] = package
    return finder
