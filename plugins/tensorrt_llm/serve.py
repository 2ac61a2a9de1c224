"""`python3 -m twofour_sparse ENGINE ...`: trtllm-serve, after the engine's package has registered its sparse layers.

TensorRT-LLM has `--custom_module_dirs` since 1.2 only. Its command is a function that every release has, so the package
is imported first and the function is called in the same process. Workers get the registered class by the name of its
module, which they import from PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from plugins.common.errors import UserError
from plugins.tensorrt_llm import releases


def main(package: str) -> None:
    """Runs trtllm-serve with this process's arguments. `package` is the engine's package, imported already.

    Ends with status 2 and one line where the release is too old, or where workers would not find the package.
    """
    try:
        version = releases.installed()
        releases.require_supported(version)
        require_findable(package)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if version is not None and releases.is_newer(version):
        print(f"warning: {releases.caution(version)}: trying it", file=sys.stderr)
    with releases.naming_the_release():
        from tensorrt_llm.commands.serve import main as serve
    sys.argv[0] = "trtllm-serve"
    serve()


def require_findable(package: str) -> None:
    """Raises UserError where a worker process would not import the same package from PYTHONPATH."""
    file = Path(str(sys.modules[package].__file__)).resolve()
    spec = PathFinder.find_spec(package, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != file:
        raise UserError(
            f"TensorRT-LLM's workers would not find '{file}', which contains the sparse layers: start the engine with "
            f"'{file.parents[1] / 'launch' / 'serve.sh'}', or put '{file.parents[1]}' on PYTHONPATH"
        )
