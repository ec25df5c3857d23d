"""Where a result was made: the card, what drives it, and the sources."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import compiled
import torch

ROOT = Path(__file__).parents[1]
# Of all that is built, run or tested.
SOURCES = {"csrc": "*", "gemma4_kernels": "*.py", "python": "*", "tests": "*", "bench": "*.py"}


def facts() -> dict[str, Any]:
    return {
        "card": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "toolkit": toolkit_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sources": sources_digest(),
        "commit": commit(),
    }


def toolkit_version() -> str | None:
    try:
        return compiled.setup_py.find_toolkit(os.environ)[1]
    except compiled.setup_py.UnavailableError:
        return None


def commit() -> str | None:
    return said("git", "-C", str(ROOT), "rev-parse", "HEAD")


def said(*command: str) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def sources_digest() -> str:
    """The same for a copy without its history; what is made while running does not count."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder, pattern in SOURCES.items():
        files += (ROOT / folder).rglob(pattern)
    digest = hashlib.sha256()
    for file in sorted(files):
        made = any(part == "__pycache__" or part.endswith(".egg-info") for part in file.parts)
        if file.is_file() and not made:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
