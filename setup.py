"""Packages and version, and whether and for which GPUs the CUDA kernels are compiled.

setup.py and not pyproject.toml names the packages because two import packages from two folders,
`gemma4_kernels` and `gemma4` (in `python/`), make one distribution.
"""

import ast
import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "gemma4_kernels"
# By major compute capability. sm_80, sm_100 and sm_120 code runs on every card of its major
# number but Tegra's; sm_90a, the only target with wgmma, on 9.0 alone.
CODE = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}
TEGRA = {(8, 7), (10, 1)}
# The one PTX worth keeping: every later card can compile it.
PTX = "compute_80"
ALL = [*CODE.values(), PTX]
USUAL_PREFIX = Path("/usr/local/cuda")
# The oldest torch whose stable ABI the library uses: it loads under that one and all later ones.
TARGET = "2.11"
# Of the package's modules the one that imports no torch, which may be absent here.
fingerprint = runpy.run_path(str(ROOT / PACKAGE / "fingerprint.py"))["fingerprint"]


class UnavailableError(Exception):
    """Why no kernels can be compiled here: fatal where they are forced, else CPU only."""


@dataclass(frozen=True)
class Plan:
    """What is compiled; without archs nothing is, and `reason` says why. `note` names GPUs that
    the archs leave out."""

    archs: tuple[str, ...] = ()
    toolkit: Path | None = None
    toolkit_version: str | None = None
    torch: str | None = None
    reason: str | None = None
    note: str = ""

    def __str__(self) -> str:
        if not self.archs:
            return f"CPU only, because {self.reason}"
        return f"building CUDA kernels for {', '.join(self.archs)}{self.note}"


def torch_is_installed() -> bool:
    """In the build's environment, or in the one that pip's build isolation hides."""
    return PathFinder.find_spec("torch", [*sys.path, sysconfig.get_path("purelib")]) is not None


def import_torch() -> ModuleType:
    """The torch to compile against: the build's own, else the one the kernels will run under.

    pip's build isolation hides that one, yet leaves the interpreter the environment's own: it is
    found where that keeps its packages.
    """
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch preloads
        raise UnavailableError(
            f"torch cannot be imported while building ({error}); install torch, then run "
            "pip install --no-build-isolation ."
        ) from None
    return torch


def driver_has_gpu() -> bool:
    """Whether the CUDA driver has one to show, which can be asked where there is no torch."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return not failed and count.value > 0


def find_need(env: Mapping[str, str]) -> str:
    """For whom kernels are to be compiled."""
    if env.get("GEMMA4_KERNELS_BUILD") == "cuda":
        return "GEMMA4_KERNELS_BUILD is cuda"
    if env.get("TORCH_CUDA_ARCH_LIST"):
        return "TORCH_CUDA_ARCH_LIST is set"
    if driver_has_gpu():
        return "there is a GPU"
    raise UnavailableError("there is no GPU and TORCH_CUDA_ARCH_LIST is not set")


def targets(
    capabilities: Iterable[tuple[int, int]], ptx: bool = False
) -> tuple[list[str], list[str]]:
    """Code for the cards that run ours, PTX for others and later ones; and those too old for it."""
    archs, missing = {PTX} if ptx else set(), []
    for major, minor in sorted(set(capabilities)):
        if major < 8:
            missing.append(f"{major}.{minor}")
        else:
            archs.add(PTX if (major, minor) in TEGRA else CODE.get(major, PTX))
    return [arch for arch in ALL if arch in archs], missing


def listed_targets(arch_list: str) -> tuple[list[str], list[str]]:
    """The same for TORCH_CUDA_ARCH_LIST: "8.0;9.0a", also with spaces; +PTX adds ours."""
    capabilities, ptx = [], False
    for entry in re.split(r"[;, ]+", arch_list.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if not match:
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST must name compute capabilities, such as 8.0;9.0a+PTX; "
                f"got {entry!r}"
            )
        capabilities.append((int(match[1]), int(match[2])))
        ptx |= bool(match[3])
    return targets(capabilities, ptx)


def toolkit_version(prefix: Path) -> str | None:
    """The CUDA version at a prefix that holds a compiler and headers, else None."""
    nvcc = prefix / "bin" / "nvcc"
    if not nvcc.is_file() or not (prefix / "include" / "cuda_runtime_api.h").is_file():
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    return match[1] if match else None


def find_toolkit(env: Mapping[str, str]) -> tuple[Path, str]:
    """The first candidate that really holds a toolkit, and its version.

    nvcc on the PATH may be a wrapper far from the toolkit; what it would run tells the place.
    """
    candidates = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
        said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        candidates += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)]
    candidates.append(USUAL_PREFIX)
    for prefix in candidates:
        version = toolkit_version(prefix)
        if version:
            return prefix.resolve(), version
    looked = ", ".join(dict.fromkeys(map(str, candidates)))
    raise UnavailableError(
        f"no CUDA toolkit (bin/nvcc and include/cuda_runtime_api.h) is in {looked}"
    )


def plan_cuda(env: Mapping[str, str], forced: bool) -> Plan:
    find_need(env)
    toolkit, version = find_toolkit(env)
    torch = import_torch()
    if not torch.version.cuda:
        raise UnavailableError(f"torch {torch.__version__} is a build without CUDA")
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise UnavailableError(
            f"the toolkit in {toolkit} is CUDA {version}, but torch {torch.__version__} "
            f"is built for CUDA {torch.version.cuda}"
        )
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if env.get("TORCH_CUDA_ARCH_LIST"):
        archs, missing = listed_targets(env["TORCH_CUDA_ARCH_LIST"])
    elif gpus:
        archs, missing = targets(gpus)
    elif forced:
        archs, missing = ALL, []
    else:
        raise UnavailableError("torch sees no GPU and TORCH_CUDA_ARCH_LIST is not set")
    if not archs:
        raise UnavailableError(f"there are no kernels for compute capability {', '.join(missing)}")
    note = f" (there are none for capability {', '.join(missing)})" if missing else ""
    return Plan(tuple(archs), toolkit, version, torch.__version__, note=note)


def plan(env: Mapping[str, str]) -> Plan:
    """What to compile on this machine; GEMMA4_KERNELS_BUILD=cuda or cpu forces either."""
    wanted = env.get("GEMMA4_KERNELS_BUILD", "")
    if wanted not in ("", "cuda", "cpu"):
        raise ValueError(f"GEMMA4_KERNELS_BUILD must be cuda or cpu, got {wanted!r}")
    if wanted == "cpu":
        return Plan(reason="GEMMA4_KERNELS_BUILD is cpu")
    try:
        return plan_cuda(env, forced=wanted == "cuda")
    except UnavailableError as why:
        if wanted == "cuda":
            raise ValueError(f"GEMMA4_KERNELS_BUILD is cuda, but {why}") from None
        return Plan(reason=str(why))


def build_requirements(env: Mapping[str, str]) -> list[str]:
    """torch, where kernels can be compiled and there is none yet to compile them against.

    One of the build's own is gigabytes, so only then. The library loads under the one that is
    installed later as well: it needs no more than the stable ABI.
    """
    if env.get("GEMMA4_KERNELS_BUILD") == "cpu" or torch_is_installed():
        return []
    try:
        need, (toolkit, version) = find_need(env), find_toolkit(env)
    except UnavailableError:
        return []  # the plan will say so
    print(
        f"gemma4-kernels: asking for torch to compile against, which is not installed, because "
        f"{need} and CUDA {version} in {toolkit}",
        file=sys.stderr,
        flush=True,
    )
    return [f"torch>={TARGET}"]


def gencode(arch: str) -> str:
    return f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}"


def compile_flags() -> list[str]:
    major, minor = map(int, TARGET.split("."))
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    return ["-std=c++20", "-O3", "-DUSE_CUDA", target]


def nvcc_flags(archs: Iterable[str]) -> list[str]:
    shown = ["-lineinfo", "-Xptxas=-v"]
    packed = ["-Xfatbin=-compress-all", "-Xcompiler=-fvisibility=hidden"]
    return [*compile_flags(), *shown, *packed, *map(gencode, archs)]


def extension_arguments(plan: Plan) -> dict[str, Any]:
    """What setup() gets for the compiled library: no PyInit, torch.ops.load_library opens it."""
    os.environ["CUDA_HOME"] = str(plan.toolkit)  # torch reads it when the next line runs
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.cu"))
    threads = ["--threads=2"] if len(plan.archs) > 1 else []
    library = CUDAExtension(
        f"{PACKAGE}._C",
        ["csrc/bindings.cpp", *kernels],
        extra_compile_args={
            "cxx": [*compile_flags(), "-fvisibility=hidden"],
            "nvcc": [*nvcc_flags(plan.archs), *threads],
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": noting(BuildExtension, plan)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def write_facts(plan: Plan, folder: Path) -> None:
    """Puts the plan beside the modules, for build_info(): pip does not show what setup.py says.

    The library's fingerprint goes along, for one that is damaged would kill whoever opens it.
    """
    facts: dict[str, Any] = {"archs": plan.archs, "reason": plan.reason}
    if plan.archs:
        size, digest = fingerprint(folder / "_C.abi3.so")
        facts |= {
            "toolkit": plan.toolkit_version,
            "built_with": plan.torch,
            "abi_target": TARGET,
            "bytes": size,
            "fingerprint": digest,
        }
    (folder / "_build.json").write_text(json.dumps(facts) + "\n")


def noting(command: type[Command], plan: Plan) -> type[Command]:
    """The last command that makes something, which leaves the facts as well."""

    class Noting(command):
        def run(self) -> None:
            super().run()
            in_place = self.editable_mode or getattr(self, "inplace", False)
            write_facts(plan, (ROOT if in_place else Path(self.build_lib)) / PACKAGE)

    return Noting


def version() -> str:
    """The string assigned to `__version__`, read without importing (torch may be absent here)."""
    source = ROOT / PACKAGE / "__init__.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{source} assigns no __version__")


def main() -> None:
    arguments: dict[str, Any] = {}
    if "egg_info" in sys.argv:
        # Where a front end asks what the build requires, setuptools answers with this.
        arguments = {"setup_requires": build_requirements(os.environ)}
    # The commands that make metadata or an sdist compile nothing.
    elif not {"dist_info", "sdist"} & set(sys.argv):
        try:
            chosen = plan(os.environ)
        except ValueError as error:
            sys.exit(f"gemma4-kernels: {error}")
        print(f"gemma4-kernels: {chosen}", file=sys.stderr, flush=True)
        if chosen.archs:
            arguments = extension_arguments(chosen)
        else:
            arguments = {"cmdclass": {"build_py": noting(build_py, chosen)}}
    setup(
        version=version(),
        packages=[*find_packages(include=[f"{PACKAGE}*"]), *find_packages("python")],
        package_dir={PACKAGE: PACKAGE, "gemma4": "python/gemma4"},
        package_data={
            PACKAGE: ["py.typed"],
            "gemma4": ["py.typed"],
            "gemma4.demo": ["*.json", "*.jinja", "*.safetensors", "README.md"],
        },
        **arguments,
    )


if __name__ == "__main__":
    main()
