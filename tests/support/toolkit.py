"""What stands for a CUDA toolkit where setup.py looks for one."""

from pathlib import Path

FORCED = {"GEMMA4_KERNELS_BUILD": "cuda"}


def make_toolkit(prefix: Path, version: str = "13.0", headers: bool = True) -> Path:
    """A folder that passes for a toolkit; its nvcc says the version and, dry, where it lies."""
    (prefix / "bin").mkdir(parents=True)
    nvcc = prefix / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release {version}, V{version}.1"\n'
        f'else echo "#$ TOP={prefix}/bin/.." >&2; fi\n'
    )
    nvcc.chmod(0o755)
    if headers:
        (prefix / "include").mkdir()
        (prefix / "include" / "cuda_runtime_api.h").touch()
    return prefix
