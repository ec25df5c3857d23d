"""What a check found, kept in the user's cache folder for each card, driver and build."""

import ctypes
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import extension


@dataclass(frozen=True)
class Card:
    """What a check's result holds for: cards of one name and capability are alike."""

    name: str
    capability: str
    driver: str
    build: str  # the fingerprint of the compiled library


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver; "unknown" where its management library is not there."""
    version = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
            return "unknown"
    except (OSError, AttributeError):
        return "unknown"
    return version.value.decode(errors="replace")


def path(card: Card) -> Path:
    """Raises RuntimeError where there is neither an XDG_CACHE_HOME nor a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()
    digest = hashlib.sha256(json.dumps(asdict(card)).encode()).hexdigest()
    return folder / "gemma4-kernels" / f"checked-{digest[:16]}.json"


def read(card: Card) -> dict[str, str] | None:
    """The ops whose kernels failed, each with the reason; None if no check of just this card,
    driver and build can be read. Never raises."""
    try:
        found = json.loads(path(card).read_bytes())
        if found["card"] != asdict(card):
            return None
        failed = found["failed"]
        if all(isinstance(x, str) for item in failed.items() for x in item):
            return dict(failed)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        pass  # damaged, or another program's
    return None


def write(card: Card, failed: dict[str, str]) -> None:
    """Replaces what was kept for this card, at once and wholly. Raises OSError or RuntimeError."""
    target = path(card)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"card": asdict(card), "failed": failed}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def card(device: torch.device) -> Card:
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return Card(name, f"{major}.{minor}", driver(), extension.BUILD.fingerprint)


@functools.cache
def failed(device: torch.device) -> dict[str, str]:
    """The ops whose kernels are not used on this device, each with the reason; read once."""
    found = read(card(device)) or {}
    return {op: f"it failed gemma4 check on this card, where it {why}" for op, why in found.items()}


def summary(device: torch.device) -> str:
    """What is known of the kernels on a device that they are compiled for."""
    found = read(card(device))
    if found is None:
        return "never checked here: run gemma4 check"
    if not found:
        return "checked on this card"
    return f"checked on this card; not used, for they failed: {', '.join(found)}"
