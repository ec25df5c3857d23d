"""Finds the compiled CUDA library and says which build it is, or why there is none."""

import functools
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .fingerprint import fingerprint

_FOLDER = Path(__file__).parent
# Tegra's chips run no code that was made for other cards of their major number, only PTX.
_TEGRA = {(8, 7), (10, 1)}


@dataclass(frozen=True)
class Build:
    """The compiled library as it was built and, if `reason` is None, loaded."""

    archs: tuple[str, ...] = ()  # as nvcc names them: sm_80 is code, compute_80 is PTX
    toolkit: str | None = None
    abi_target: str | None = None
    reason: str | None = None


def load(folder: Path = _FOLDER) -> Build:
    """Loads the library in `folder`; what stands in the way is the reason, never an error.

    Neither a GPU nor a driver is needed, and CUDA is not initialised. torch is imported first, for
    the library finds its own and CUDA's shared objects where torch has put them.
    """
    facts, library = folder / "_build.json", folder / "_C.abi3.so"
    try:
        noted = json.loads(facts.read_text())
        # Not the library's presence decides: an editable install may have left an earlier one.
        if not noted["archs"]:
            return Build(reason=f"installed without CUDA kernels, because {noted['reason']}")
        made = Build(tuple(noted["archs"]), noted["toolkit"], noted["abi_target"])
        built_with, size, digest = noted["built_with"], noted["bytes"], noted["fingerprint"]
    except FileNotFoundError:
        return Build(reason="this is a source tree that was never installed: run pip install")
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Build(reason=f"{facts} is not what a build writes ({error!r}): run pip install")
    try:
        _check_unchanged(library, size, digest)
        torch.ops.load_library(library)
    except OSError as error:
        why = error.__cause__ or error  # since torch 2.13 an OSError that names only the path
        reason = f"the CUDA kernels, built with torch {built_with}, do not load: {why}"
        return replace(made, reason=reason)
    return made


def _check_unchanged(library: Path, bytes_built: int, digest_built: str) -> None:
    """Raises OSError unless the file is what was built: the loader dies of one that is damaged."""
    size, digest = fingerprint(library)
    if size != bytes_built:
        sizes = f"{size} bytes and was built with {bytes_built}"
        raise OSError(f"{library} has {sizes}: run pip install")
    if digest != digest_built:
        raise OSError(f"{library} has changed since it was built: run pip install")


BUILD = load()


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    kind, _, number = arch.partition("_")
    target = divmod(int(number.removesuffix("a")), 10)
    if kind == "compute":
        return capability >= target
    if number.endswith("a") or capability in _TEGRA:
        return capability == target
    return capability[0] == target[0] and capability[1] >= target[1]


@functools.cache
def covers(device: torch.device) -> bool:
    """Whether the loaded library holds code for this device; if not, a warning says so once."""
    if BUILD.reason or device.type != "cuda" or not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(arch, capability) for arch in BUILD.archs):
        return True
    warnings.warn(
        f"gemma4-kernels runs eager torch on {device} ({torch.cuda.get_device_name(device)}): its "
        f"compute capability is {capability[0]}.{capability[1]}, and the kernels are compiled for "
        f"{', '.join(BUILD.archs)}",
        stacklevel=2,
    )
    return False
