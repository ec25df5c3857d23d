"""The `emulated` backend: csrc compiled by g++ with the emulator, loaded beside the real ops.

The library is built once and kept in build/; ninja compiles again what has changed, headers
included. Its ops live in a torch.library namespace of their own, which takes the compiled library's
place under the public ops. Every call runs under several schedules, which must agree to the bit.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import gemma4_kernels.ops
from gemma4_kernels import opset

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
NAME = "gemma4_emulated"
given_library: Path | None = None
SCHEDULES = [(1, "RUN_AHEAD"), (2, "ADVERSARIAL"), (3, "FAIR")]  # seed, policy

FLAGS = (
    "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-tsan"
    f" -DGEMMA4_EMULATION={NAME}"
)
# What a model is made of, by the names of the ops' arguments: a dependent launch may read it before
# it has waited for the kernel before it, which may have written anything else.
PARAMETERS = {"weight", "post_weight", "norm_weight", "next_weight", "q_weight", "k_weight"}
PARAMETERS |= {"x_weight", "other_weight", "expert_weight", "scale", "router", "router_scale"}
PARAMETERS |= {"per_expert_scale", "gate_up", "down", "dense", "table", "inv_freq"}
PACKABLE = ("weight", "gate_up", "down", "dense")
PARAMETERS |= {f"{name}_{scales}" for name in PACKABLE for scales in ("scales", "row_scales")}
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


INSTRUMENTS = {
    # Its calls go to emulation/hooks.cpp, and its library is not linked.
    "hooks": "-fsanitize=thread",
    # Must be loaded before Python; takes the place of the hooks. Counts the lines that run, too.
    "address": "-O1 -fsanitize=address --coverage",
}


def _flags(instrument: str) -> tuple[str, str, str]:
    """For kernels, for what runs them, and for linking both.

    Vectorised code would make accesses wider than the source's.
    """
    flag = INSTRUMENTS[instrument]
    kernels = f"{FLAGS} -x c++ -fno-tree-vectorize {flag}"
    host = FLAGS if instrument == "hooks" else f"{FLAGS} {flag}"
    return kernels, host, "" if instrument == "hooks" else flag


def has_compiler() -> bool:
    return shutil.which("c++") is not None


def _compiler() -> str:
    return "ccache c++" if shutil.which("ccache") else "c++"


def _ninja(folder: Path, target: str, link: str, sources: dict[Path, str]) -> Path:
    """Compiles each source with its flags, links them, and returns the target; does what is out of
    date and no more.

    Raises RuntimeError with the compiler's words if that fails.
    """
    import ninja

    lines = [
        "rule compile",
        f"  command = {_compiler()} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = c++ $in -o $out {link} -ldl",
    ]
    objects = []
    for source, flags in sources.items():
        objects.append(_object(source))
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
    lines.append(f"build {target}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
    with (folder / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{target} does not build:\n{run.stdout[-4000:]}{run.stderr}")
    return folder / target


def _object(source: Path) -> str:
    return f"{source.parent.name}_{source.stem}.o"


def build(csrc: Path = CSRC, folder: Path = BUILD / "emulation", instrument: str = "hooks") -> Path:
    """The library of the emulated kernels, a Python module too."""
    import pybind11

    torch_root = Path(torch.__file__).parent
    kernels, host, link = _flags(instrument)
    flags = dict.fromkeys(sorted(csrc.glob("*/*.cu")), kernels)
    flags |= dict.fromkeys(sorted(csrc.glob("emulation/*.cpp")), host)
    binding = f"{host} {TORCH_TARGET} -isystem {torch_root / 'include'}"
    flags |= dict.fromkeys(sorted(csrc.glob("binding/*.cpp")), binding)
    # Not torch's own pybind11, which is no part of the stable ABI.
    python = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    flags[csrc / "emulation" / "module.cpp"] += f" {python}"
    link = f"{link} -shared -L{torch_root / 'lib'} -ltorch_cpu"
    return _ninja(folder, f"{NAME}.so", link, flags)


# Kernels of several ops are launched in a file of their own.
LAUNCHED_BY = {"attention_prefill": "attention", "attention_decode": "attention"}
LAUNCHED_BY |= {"geglu": "gelu_mul", "ple_gate": "gelu_mul"}
LAUNCHED_BY |= {"rms_norm_backward": "weight_gradients"}
LAUNCHED_BY |= dict.fromkeys(("geglu_backward", "ple_gate_backward"), "gelu_mul_backward")


def rebuild(op: str, csrc: Path, folder: Path) -> Path:
    """The library with one op's objects compiled from another source tree, in little time."""
    library = build()
    names = [op.removesuffix("_cache")]
    if op in LAUNCHED_BY:
        names.append(LAUNCHED_BY[op])
    # Relative paths and no folder in the key: ccache knows a fault again in another copy.
    environment = {**os.environ, "CCACHE_DEPEND": "1", "CCACHE_NOHASHDIR": "1"}
    replaced = {}
    for name in names:
        (source,) = csrc.glob(f"*/{name}.cu")
        target = folder / _object(source)
        # A test runs less code of one object than there is to compile.
        flags = f"{_flags('hooks')[0]} -O0 -w -MMD"
        command = f"{_compiler()} {flags} -c {source.name} -o {target}"
        subprocess.run(command.split(), check=True, cwd=source.parent, env=environment)
        replaced[target.name] = target
    # Not all that lie there: a file that was renamed left its object.
    objects = map(_object, [*CSRC.glob("*/*.cu"), *CSRC.glob("*/*.cpp")])
    kept = [library.parent / name for name in objects if name not in replaced]
    torch_lib = Path(torch.__file__).parent / "lib"
    # What is replaced comes first: of an inline function in many objects the linker takes that one.
    command = ["c++", *replaced.values(), *kept, "-o", folder / library.name]
    subprocess.run([*command, "-shared", f"-L{torch_lib}", "-ltorch_cpu", "-ldl"], check=True)
    return folder / library.name


def build_checks(instrument: str = "hooks") -> Path:
    """The program of tests/kernels/emulation_checks.cpp."""
    kernels, host, link = _flags(instrument)
    sources = dict.fromkeys(sorted(CSRC.glob("emulation/*.cpp")), host)
    del sources[CSRC / "emulation" / "module.cpp"]
    sources[ROOT / "tests" / "kernels" / "emulation_checks.cpp"] = f"{kernels} -I{CSRC}"
    folder = BUILD / f"emulation_checks_{instrument}"
    return _ninja(folder, "emulation_checks", link, sources)


def ops_with_kernels() -> list[str]:
    """The ops that have a launcher, known without building it."""
    launchers = {path.stem for path in CSRC.glob("*/*.cu")}
    return [name for name in opset.OPS if name.removesuffix("_cache") in launchers]


def _same_bits(a: Any, b: Any) -> bool:
    if a is None or isinstance(a, tuple):
        return a is b or all(map(_same_bits, a, b))
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@contextlib.contextmanager
def one_schedule() -> Iterator[None]:
    """Calls run once, so that what they do can be counted."""
    others = SCHEDULES[1:]
    del SCHEDULES[1:]
    yield
    SCHEDULES.extend(others)


class EmulatedKernels(opset.Kernels):
    """Runs each call under every schedule and demands the same bits of all."""

    def call(self, op: opset.Op, args: tuple[Any, ...]) -> Any:
        settings, results, alone = control().settings, [], len(SCHEDULES) == 1
        # What a call writes it may read too: each schedule is to find the same.
        schema = op.registered.default._schema.arguments
        self.set_dependent_launches(True)
        pairs = zip(args, schema, strict=True)
        written = [x for x, a in pairs if a.alias_info is not None and x is not None]
        before = [] if alone else [x.clone() for x in written]
        for settings.seed, policy in SCHEDULES:
            for x, old in zip(written, before, strict=False):
                x.copy_(old)
            settings.policy = getattr(control().Policy, policy)
            result = super().call(op, args)
            results.append((result, *(x.clone() for x in written if not alone)))
        for other in results[1:]:
            assert _same_bits(results[0], other), f"{op.name}: the schedules disagree"
        return results[0][0]


@functools.cache
def control() -> ModuleType:
    """The emulator's controls (settings, counts), from `given_library` or a fresh build."""
    spec = importlib.util.spec_from_file_location(NAME, given_library or build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.settings.parameters = PARAMETERS
    return module


def kernel_names() -> dict[int, str]:
    """The signature of each function of the library, by its address there."""
    library = control().__file__
    command = ["nm", "-C", "--defined-only", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(" ", 2) for line in listed.splitlines())
    return {int(address, 16): name for address, _, name in rows}


@functools.cache
def kernels() -> EmulatedKernels:
    control()  # registers them
    return EmulatedKernels(NAME, "CPU", lambda device: True)


def ops() -> ModuleType:
    """The public ops, with the emulated kernels under them until a test ends."""
    opset.kernels = kernels()
    return gemma4_kernels.ops
