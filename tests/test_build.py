"""What setup.py decides and notes, and what ptxas and the disassembler say of every kernel on
every architecture.

Longer than 400 lines because each kind of machine that an install meets is a case here.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import compiled
import pytest
import setuptools
import torch
from conftest import needs_compiler
from setuptools import Command, Distribution
from setuptools.command.build_py import build_py

import gemma4_kernels
from gemma4_kernels import extension

ROOT = Path(__file__).parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))
TORCH = Path(torch.__file__).parent


setup_py = compiled.setup_py


# What is compiled


@pytest.mark.parametrize(
    "listed, archs",
    [
        ("8.0;9.0a", "sm_80 sm_90a"),
        ("9.0 8.0", "sm_80 sm_90a"),
        ("8.6,8.9", "sm_80"),
        ("10.0a 10.3;12.0f;", "sm_100 sm_120"),
        ("9.0+PTX", "sm_90a compute_80"),
        ("8.0;12.0+PTX", "sm_80 sm_120 compute_80"),
        ("8.0;8.7", "sm_80 compute_80"),
        ("11.0a", "compute_80"),
    ],
)
def test_arch_list(listed, archs):
    assert setup_py.listed_targets(listed) == (archs.split(), [])


def test_arch_list_with_cards_too_old():
    """Images come with a list of everything that their torch is built for."""
    archs, missing = setup_py.listed_targets("5.2;7.5 8.0 8.6 9.0 10.0 12.0+PTX")
    assert archs == ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_80"]
    assert missing == ["5.2", "7.5"]


@pytest.mark.parametrize("listed", ["9", "90a", "Hopper", "8.0;11", "native", "8.0+ptx"])
def test_arch_list_of_others(listed):
    wrong = listed.split(";")[-1]
    with pytest.raises(ValueError, match=re.escape(f"such as 8.0;9.0a+PTX; got '{wrong}'")):
        setup_py.listed_targets(listed)


@pytest.mark.parametrize(
    "gpus, archs, missing",
    [
        ([(8, 6), (8, 9)], ["sm_80"], []),
        ([(9, 0), (8, 0), (9, 0)], ["sm_80", "sm_90a"], []),
        ([(10, 3), (12, 1)], ["sm_100", "sm_120"], []),
        ([(7, 5), (11, 0), (12, 0)], ["sm_120", "compute_80"], ["7.5"]),
        ([(8, 7)], ["compute_80"], []),
        ([(8, 0), (8, 7)], ["sm_80", "compute_80"], []),
        ([(10, 1)], ["compute_80"], []),
        ([(13, 0)], ["compute_80"], []),
    ],
)
def test_visible_gpus(gpus, archs, missing):
    assert setup_py.targets(gpus) == (archs, missing)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 1)])
@pytest.mark.parametrize("later", [(10, 3), (11, 0), (12, 0), (12, 1), (13, 0), (20, 3)])
def test_what_is_built_for_a_card_runs_on_it(capability, later):
    """The rule of setup.py, which cannot import the package, and the package's are one."""
    archs, _ = setup_py.targets([capability, later])
    for card in (capability, later):
        assert any(extension._runs_on(arch, card) for arch in archs)


def test_gencode():
    assert [setup_py.gencode(arch) for arch in ("sm_90a", "compute_80")] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_target_of_the_stable_abi():
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in setup_py.nvcc_flags(["sm_80"])


# The toolkit


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


@pytest.fixture
def no_usual_prefix(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py, "USUAL_PREFIX", tmp_path / "nowhere")


def test_toolkit_of_the_environment_comes_first(tmp_path, no_usual_prefix):
    a, b = make_toolkit(tmp_path / "a"), make_toolkit(tmp_path / "b", "12.8")
    env = {"CUDA_HOME": str(b), "PATH": str(a / "bin")}
    assert setup_py.find_toolkit(env) == (b, "12.8")
    assert setup_py.find_toolkit({"CUDA_PATH": str(b)}) == (b, "12.8")


def test_toolkit_by_the_path(tmp_path, no_usual_prefix):
    toolkit = make_toolkit(tmp_path / "cuda")
    link = tmp_path / "elsewhere" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(toolkit / "bin" / "nvcc")
    assert setup_py.find_toolkit({"PATH": str(link.parent)}) == (toolkit, "13.0")


def test_toolkit_behind_a_wrapper(tmp_path, no_usual_prefix):
    toolkit = make_toolkit(tmp_path / "cuda")
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert setup_py.find_toolkit({"PATH": str(wrapper.parent)}) == (toolkit, "13.0")


def test_toolkit_in_the_usual_place(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_py, "USUAL_PREFIX", make_toolkit(tmp_path / "cuda"))
    assert setup_py.find_toolkit({}) == (tmp_path / "cuda", "13.0")


def test_half_a_toolkit_is_none(tmp_path, no_usual_prefix):
    half = make_toolkit(tmp_path / "half", headers=False)
    with pytest.raises(setup_py.UnavailableError, match=rf"no CUDA toolkit .* is in {half}, "):
        setup_py.find_toolkit({"CUDA_HOME": str(half)})


# The decision


@pytest.fixture
def decide(tmp_path, monkeypatch, no_usual_prefix) -> Callable[..., object]:
    """setup.py's plan on a machine with these GPUs, this torch and this toolkit.

    The driver has the GPUs that torch sees unless `driver` says otherwise.
    """

    def decide(env=None, gpus=(), cuda="13.0", toolkit="13.0", driver=None):
        fake = SimpleNamespace(
            __version__="2.14.1",
            version=SimpleNamespace(cuda=cuda),
            cuda=SimpleNamespace(
                device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
            ),
        )
        monkeypatch.setattr(setup_py, "import_torch", lambda: fake)
        has_gpu = bool(gpus) if driver is None else driver
        monkeypatch.setattr(setup_py, "driver_has_gpu", lambda: has_gpu)
        home = tmp_path / f"cuda-{toolkit}"
        if toolkit and not home.exists():
            make_toolkit(home, toolkit)
        return setup_py.plan({"CUDA_HOME": str(home), **(env or {})})

    return decide


FORCED = {"GEMMA4_KERNELS_BUILD": "cuda"}


def test_builds_for_the_gpus_it_sees(decide, tmp_path):
    plan = decide(gpus=[(9, 0), (7, 5)])
    assert (plan.archs, plan.reason) == (("sm_90a",), None)
    assert (plan.toolkit, plan.toolkit_version) == (tmp_path / "cuda-13.0", "13.0")
    assert str(plan) == "building CUDA kernels for sm_90a (there are none for capability 7.5)"


@pytest.mark.parametrize("gpus", [[], [(9, 0)], [(7, 5)]])
def test_the_list_wins_over_the_gpus(decide, gpus):
    plan = decide({"TORCH_CUDA_ARCH_LIST": "8.0;10.0"}, gpus)
    assert plan.archs == ("sm_80", "sm_100") and plan.note == ""


def test_forced_without_a_list_is_all(decide):
    assert decide(FORCED).archs == ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")
    assert decide({**FORCED, "TORCH_CUDA_ARCH_LIST": "9.0"}).archs == ("sm_90a",)


@pytest.mark.parametrize(
    "machine, reason",
    [
        ({}, "there is no GPU and TORCH_CUDA_ARCH_LIST is not set"),
        ({"cuda": None, "gpus": [(9, 0)]}, "torch 2.14.1 is a build without CUDA"),
        ({"gpus": [(7, 5)]}, "there are no kernels for compute capability 7.5"),
        (
            {"env": {"TORCH_CUDA_ARCH_LIST": "7.5"}, "gpus": [(9, 0)]},
            "there are no kernels for compute capability 7.5",
        ),
        ({"gpus": [(9, 0)], "toolkit": ""}, "no CUDA toolkit (bin/nvcc"),
        ({"gpus": [(9, 0)], "toolkit": "12.8"}, "is CUDA 12.8, but torch 2.14.1 is built for CUD"),
    ],
)
def test_cpu_only_or_an_error_where_forced(decide, machine, reason):
    plan = decide(**machine)
    assert plan.archs == () and reason in plan.reason
    assert str(plan).startswith("CPU only, because ")
    if machine:
        with pytest.raises(ValueError, match="GEMMA4_KERNELS_BUILD is cuda, but ") as error:
            decide(**{**machine, "env": {**machine.get("env", {}), **FORCED}})
        assert reason in str(error.value)


def test_cpu_is_forced(decide):
    plan = decide({"GEMMA4_KERNELS_BUILD": "cpu"}, gpus=[(9, 0)])
    assert (plan.archs, plan.reason) == ((), "GEMMA4_KERNELS_BUILD is cpu")


def test_other_values_are_errors(decide):
    with pytest.raises(ValueError, match="GEMMA4_KERNELS_BUILD must be cuda or cpu, got 'yes'"):
        decide({"GEMMA4_KERNELS_BUILD": "yes"})
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST must name .* got 'Ampere'"):
        decide({"TORCH_CUDA_ARCH_LIST": "Ampere"}, gpus=[(8, 0)])


def test_a_gpu_that_torch_does_not_see(decide):
    reason = "torch sees no GPU and TORCH_CUDA_ARCH_LIST is not set"
    assert decide(driver=True).reason == reason


@pytest.mark.parametrize(
    "count, init, has_gpu", [(1, 0, True), (8, 0, True), (0, 0, False), (1, 100, False)]
)
def test_the_driver_is_asked_for_gpus(monkeypatch, count, init, has_gpu):
    def get_count(pointer):
        pointer._obj.value = count
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=get_count)
    monkeypatch.setattr(setup_py.ctypes, "CDLL", {"libcuda.so.1": driver}.get)
    assert setup_py.driver_has_gpu() is has_gpu


def test_no_driver(monkeypatch):
    def not_found(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(setup_py.ctypes, "CDLL", not_found)
    assert not setup_py.driver_has_gpu()


# The torch that is compiled against


def test_no_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    env = {"CUDA_HOME": str(make_toolkit(tmp_path / "cuda"))}
    plan = setup_py.plan({**env, "TORCH_CUDA_ARCH_LIST": "9.0"})
    assert plan.reason.startswith("torch cannot be imported while building (")
    assert plan.reason.endswith("; install torch, then run pip install --no-build-isolation .")
    with pytest.raises(ValueError, match="is cuda, but torch cannot be imported"):
        setup_py.plan({**env, **FORCED})


@pytest.fixture
def require(tmp_path, monkeypatch, no_usual_prefix) -> Callable[..., list[str]]:
    """What the build requires on a machine like this."""

    def require(env=None, torch=False, gpu=True, toolkit=True):
        monkeypatch.setattr(setup_py, "torch_is_installed", lambda: torch)
        monkeypatch.setattr(setup_py, "driver_has_gpu", lambda: gpu)
        home = make_toolkit(tmp_path / "cuda") if toolkit else tmp_path
        return setup_py.build_requirements({"CUDA_HOME": str(home), **(env or {})})

    return require


@pytest.mark.parametrize(
    "machine, need",
    [
        ({}, "there is a GPU"),
        ({"gpu": False, "env": {"TORCH_CUDA_ARCH_LIST": "9.0"}}, "TORCH_CUDA_ARCH_LIST is set"),
        ({"gpu": False, "env": FORCED}, "GEMMA4_KERNELS_BUILD is cuda"),
    ],
)
def test_torch_is_asked_for_where_it_alone_is_missing(require, machine, need, tmp_path, capsys):
    assert require(**machine) == ["torch>=2.11"]
    assert capsys.readouterr().err == (
        "gemma4-kernels: asking for torch to compile against, which is not installed, because "
        f"{need} and CUDA 13.0 in {tmp_path}/cuda\n"
    )


@pytest.mark.parametrize(
    "machine",
    [
        {"torch": True},
        {"torch": True, "env": FORCED},
        {"gpu": False},
        {"toolkit": False},
        {"toolkit": False, "env": FORCED},
        {"env": {"GEMMA4_KERNELS_BUILD": "cpu"}},
    ],
)
def test_torch_is_not_asked_for_elsewhere(require, machine, capsys):
    assert require(**machine) == [] and capsys.readouterr().err == ""


# Hides the environment's packages, as pip's build isolation does; setuptools is the build's own.
ISOLATED = (
    "import setuptools.build_meta, sys, sysconfig\n"
    f"sys.path = [p for p in sys.path if p not in {(str(PACKAGES), str(TORCH.parent))}]\n"
)


@pytest.fixture
def ask(tmp_path) -> Callable[..., tuple[object, list[str]]]:
    """A front end's call of the build backend on a machine without torch: its answer, and what the
    project said."""
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for path in Path(setuptools.__file__).parents[1].glob("setuptools*"):
        (isolated / path.name).symlink_to(path)

    def ask(hook, folder, **env):
        code = (
            f"{ISOLATED}sys.path.append({str(isolated)!r})\n"
            "sysconfig.get_path = lambda name: '/nowhere'\n"
            f"answer = setuptools.build_meta.{hook}\n"
            "print()\nprint(repr(answer))"
        )
        env = {**os.environ, **{name: str(value) for name, value in env.items()}}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("gemma4-kernels: ")]
        return ast.literal_eval(done.stdout.splitlines()[-1]), said

    return ask


@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_what_a_front_end_is_told(ask, tmp_path, hook):
    machine = {"CUDA_HOME": make_toolkit(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0"}
    wanted, said = ask(f"get_requires_for_build_{hook}()", ROOT, **machine)
    assert "torch>=2.11" in wanted
    (line,) = said
    assert line.startswith("gemma4-kernels: asking for torch")


@needs_compiler
def test_an_sdist_on_a_machine_with_a_gpu(ask, tmp_path):
    """The driver and the toolkit are stand-ins; all that the build needs is in the sdist."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "gemma4_kernels", "python"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    driver = (
        'extern "C" int cuInit(unsigned) { return 0; }\n'
        'extern "C" int cuDeviceGetCount(int* count) { *count = 1; return 0; }\n'
    )
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(command, input=driver, text=True, check=True)
    home = make_toolkit(tmp_path / "cuda")
    machine = {"CUDA_HOME": home, "LD_LIBRARY_PATH": tmp_path, "TORCH_CUDA_ARCH_LIST": ""}

    sdist, said = ask(f"build_sdist({str(tmp_path)!r})", source, **machine)
    assert said == []
    with tarfile.open(tmp_path / sdist) as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.removesuffix(".tar.gz")
    kernels = {path.relative_to(source) for path in source.glob("csrc/**/*.*")}
    assert kernels == {path.relative_to(unpacked) for path in unpacked.glob("csrc/**/*.*")}

    wanted, said = ask("get_requires_for_build_wheel()", unpacked, **machine)
    assert "torch>=2.11" in wanted
    assert said == [
        "gemma4-kernels: asking for torch to compile against, which is not installed, because "
        f"there is a GPU and CUDA 13.0 in {home}"
    ]

    build = f"build_wheel({str(tmp_path)!r})"
    wheel, said = ask(build, unpacked, **machine)  # where a front end does not listen
    (line,) = said
    assert line.startswith("gemma4-kernels: CPU only, because torch cannot be imported while build")
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        assert "cannot be imported" in archive.read("gemma4_kernels/_build.json").decode()


@pytest.mark.skipif(not (PACKAGES / "torch").is_dir(), reason="torch is installed elsewhere")
def test_torch_is_found_behind_build_isolation():
    code = (
        f"{ISOLATED}import runpy\n"
        f"namespace = runpy.run_path({str(ROOT / 'setup.py')!r})\n"
        "assert namespace['torch_is_installed']()\n"
        "print(namespace['import_torch']().__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.stdout.strip(), done.returncode) == (torch.__version__, 0), done.stderr


@pytest.fixture
def run_main(monkeypatch):
    def run_main(*argv):
        arguments = {}
        monkeypatch.setattr(setup_py.sys, "argv", ["setup.py", *argv])
        monkeypatch.setattr(setup_py, "setup", lambda **given: arguments.update(given))
        setup_py.main()
        return arguments

    return run_main


def test_the_decision_is_announced(run_main, monkeypatch, capsys):
    monkeypatch.setenv("GEMMA4_KERNELS_BUILD", "cpu")
    arguments = run_main("bdist_wheel")
    assert arguments["version"] == gemma4_kernels.__version__
    assert "ext_modules" not in arguments
    line = "gemma4-kernels: CPU only, because GEMMA4_KERNELS_BUILD is cpu\n"
    assert capsys.readouterr().err == line
    for command in ("egg_info", "dist_info", "sdist"):
        assert "cmdclass" not in run_main(command) and capsys.readouterr().err == ""


def test_an_error_is_one_line(run_main, monkeypatch):
    monkeypatch.setenv("GEMMA4_KERNELS_BUILD", "gpu")
    with pytest.raises(SystemExit) as exit:
        run_main("bdist_wheel")
    message = "gemma4-kernels: GEMMA4_KERNELS_BUILD must be cuda or cpu, got 'gpu'"
    assert exit.value.code == message


# What is noted


BUILT = setup_py.Plan(("sm_80", "sm_90a"), Path("/cuda"), "13.0", "2.14.1")


class BuildNothing(Command):
    """Stands for the command that compiles: its library is there already."""

    editable_mode = inplace = False

    def initialize_options(self):
        pass

    finalize_options = run = initialize_options


def note(command: type[Command], plan, folder: Path, **attributes) -> dict:
    command = setup_py.noting(command, plan)(Distribution())
    command.ensure_finalized()
    for name, value in {"build_lib": str(folder), **attributes}.items():
        setattr(command, name, value)
    command.run()
    return json.loads((folder / "gemma4_kernels" / "_build.json").read_text())


def test_facts_of_a_build_for_the_cpu(tmp_path):
    (tmp_path / "gemma4_kernels").mkdir()
    facts = note(build_py, setup_py.Plan(reason="torch sees no GPU"), tmp_path)
    assert facts == {"archs": [], "reason": "torch sees no GPU"}


@pytest.mark.parametrize("place", [{}, {"inplace": True}, {"editable_mode": True}])
def test_facts_of_a_library(tmp_path, monkeypatch, place):
    """Noted where the library is left: in the source tree for an editable install."""
    (tmp_path / "gemma4_kernels").mkdir()
    (tmp_path / "gemma4_kernels" / "_C.abi3.so").write_bytes(b"abc")
    if place:
        monkeypatch.setattr(setup_py, "ROOT", tmp_path)
        place = {**place, "build_lib": "/nowhere"}
    assert note(BuildNothing, BUILT, tmp_path, **place) == {
        "archs": ["sm_80", "sm_90a"],
        "reason": None,
        "toolkit": "13.0",
        "built_with": "2.14.1",
        "abi_target": "2.11",
        "bytes": 3,
        "fingerprint": hashlib.sha256(b"abc" + b"abc").hexdigest(),  # its beginning and its end
    }


# What the compiler made of the kernels

# Where tiles are chosen: wgmma is Hopper's, blocks of sm_120 have 99 KB of shared memory, those of
# sm_90a and sm_100 227 KB, and sm_80's code runs on cards of either size.
SMALL, LARGE = ("sm_80", "sm_120"), ("sm_80", "sm_90a", "sm_100")
TILES = {
    r".*HopperTile": ("sm_90a",),
    r"attention_kernel<\w+, AttentionTile<(256, 64, 32, 2|512, 48, 16, 2)>": SMALL,
    r"attention_kernel<\w+, AttentionTile<256, 64, 32, 1>": LARGE,
    r"attention_kernel<\w+, AttentionTile<512, 64, 32, 2>": ("sm_80", "sm_100"),
    r"attention_backward_kernel<\w+, AttentionTile<(256, 64, 16, 2|512, 16, 16, 4)>": SMALL,
    r"attention_backward_kernel<\w+, AttentionTile<(256, 64, 32, 2|512, 32, 16, 4)>": LARGE,
}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(kernels):
    """But for tiles that no card running its code is given."""
    made = {(kernel.name, kernel.arch) for kernel in kernels}

    def archs(name):
        matching = (archs for pattern, archs in TILES.items() if re.match(pattern, name))
        return next(matching, compiled.ARCHS)

    assert made == {(name, arch) for name, _ in made for arch in archs(name)}
    assert all(kernel.registers for kernel in kernels)


@pytest.mark.slow
def test_nothing_spills(kernels):
    assert [str(kernel) for kernel in kernels if kernel.stack] == []


# What moves rows must move them 16 bytes at a time: a row kernel's, and of the kernels that are
# cut to a width in elements those of full width.
LOAD, STORE, COPY = r"LDG\.E\..*128.*", r"STG\.E\..*128.*", r"LDGSTS\.E\..*128.*"
INSTRUCTIONS = {
    r"((add_)?rms|moe)_norm_kernel<.*>": (LOAD, STORE),
    r"qkv_norm_rope_kernel<.*>": (LOAD, STORE),
    r"ple_embed_kernel<.*>": (LOAD, STORE),
    r"(geglu|ple_gate|softcap)_kernel<(.*, 8|(.*, )?float, 4)>": (LOAD, STORE),
    r"softcap_argmax_kernel<(.*, 8|float, 4)>": (LOAD,),
    r"attention_kernel<.*AttentionTile.*>": (COPY, STORE, r"LDSM\..*", r"HMMA\.16816\..*"),
    r"attention_kernel<.*HopperTile.*>": (
        *(COPY, STORE, r"HGMMA\.64x(32|64)x16\..*", r"HGMMA\.64x128x16\..*"),
    ),
    r"attention_merge_kernel<.*>": (LOAD,),
    r"attention_delta_kernel<.*>": (LOAD,),
    r"attention_backward_kernel<.*>": (COPY, STORE, r"LDSM\..*", r"HMMA\.16816\..*"),
    r"moe_stream_\w+_kernel<.*>": (LOAD, STORE, r"HMMA\.16816\..*"),
    r"moe_tiles_kernel<.*>": (COPY, STORE, r"HMMA\.16816\..*|HGMMA\.64x128x16\..*"),
    r"moe_combine_kernel<.*>": (LOAD, STORE),
}


@pytest.mark.slow
def test_instructions(kernels):
    local = [str(kernel) for kernel in kernels if kernel.has(r"(LDL|STL)\b.*")]
    assert local == [], "kernels that use local memory"
    for pattern, wanted in INSTRUCTIONS.items():
        chosen = [kernel for kernel in kernels if re.fullmatch(pattern, kernel.name)]
        assert chosen, f"no kernel is called {pattern}"
        lacking = [
            f"{kernel} lacks {name}" for kernel in chosen for name in wanted if not kernel.has(name)
        ]
        assert lacking == []
