"""The models that commands are about, and where their results go."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

from .. import Gemma4ForCausalLM, demo
from ..checkpoint import resolve


def name_of(model: str) -> str:
    """What people call the model: the demo, a folder's own name, or a hub id."""
    if Path(model) == demo.path():
        return "demo"
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def check_devices(args: argparse.Namespace) -> None:
    for option, name in (("--device", args.device), ("--ple-device", args.ple_device)):
        device = torch.device(name or "cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"{option}: {name} is asked for, but torch sees no such device")


def folder_of(model: str) -> Path:
    if not (sys.stderr.isatty() or Path(model).exists()):
        disable_progress_bars()  # a download shows them even into a log
    return resolve(model)


def load(args: argparse.Namespace, folder: Path) -> Gemma4ForCausalLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is quantised")  # it is said below, warning or not
        model = Gemma4ForCausalLM.from_pretrained(
            folder,
            dtype=None if args.dtype == "auto" else args.dtype,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            ple_device=args.ple_device,
            progress=sys.stderr.isatty(),
            quantized="dequantize" if args.dequantize else "keep",
        )
    if model.quantized:
        print(model.quantized, file=sys.stderr)
    return model


def append_line(file: Path, row: dict[str, object]) -> None:
    """Adds an object to a file of one a line."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
