"""Compile the native CPU operators once, into the user's cache: `python -m fff.build`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from fff.ops.expert_mlp import cpu

_made: set[Path] = set()  # in this process


def build() -> Path:
    """The compiled library, made if there is none that loads; RuntimeError with the compiler's output if that fails."""
    from torch.utils import cpp_extension  # imports the compiler's tools

    path = cpu.library_path()
    if path.exists() and (path in _made or not cpu.broken()):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = cpu.compiler_flags()
    # The ninja of this environment is found even where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Built aside and moved, so that a build that is killed leaves neither half a library nor a lock.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cpp_extension.load(
            name="fff_native",
            sources=[str(cpu.SOURCE)],
            extra_cflags=flags,
            extra_ldflags=[flag for flag in flags if flag == "-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder, "fff_native.so"), path)
    _made.add(path)
    return path


def main() -> int:
    try:
        print(f"native CPU operators: {build()}")
    except (RuntimeError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        print("not built: backend='auto' falls back to the PyTorch backends (dense, grouped, gather)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
