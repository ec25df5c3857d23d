"""What setup.py decides on each kind of machine that an install meets, and what it notes."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import compiled
import pytest
from setuptools import Command, Distribution
from setuptools.command.build_py import build_py
from support.toolkit import FORCED, make_toolkit

import gemma4_kernels
from gemma4_kernels import extension

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
