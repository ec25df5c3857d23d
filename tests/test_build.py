"""What setup.py decides, what the installed package says of itself, and what ptxas and the
disassembler say of every kernel on every architecture.

Longer than 400 lines because decisions and what comes of them are tested side by side.
"""

import json
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import compiled
import pytest
import torch
from setuptools import Distribution

import gemma4_kernels
from gemma4_kernels import extension

ROOT = Path(__file__).parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))


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
    ],
)
def test_arch_list(listed, archs):
    assert setup_py.listed_archs(listed) == archs.split()


@pytest.mark.parametrize("listed", ["7.5", "9", "90a", "Hopper", "8.0;11.0", "native", "8.0+ptx"])
def test_arch_list_of_others(listed):
    wrong = listed.split(";")[-1]
    with pytest.raises(ValueError, match=re.escape(f"such as 8.0;9.0a+PTX; got '{wrong}'")):
        setup_py.listed_archs(listed)


@pytest.mark.parametrize(
    "gpus, archs, missing",
    [
        ([(8, 6), (8, 9)], ["sm_80"], []),
        ([(9, 0), (8, 0), (9, 0)], ["sm_80", "sm_90a"], []),
        ([(10, 3), (12, 1)], ["sm_100", "sm_120"], []),
        ([(7, 5), (11, 0), (12, 0)], ["sm_120"], ["7.5", "11.0"]),
    ],
)
def test_visible_gpus(gpus, archs, missing):
    assert setup_py.visible_archs(gpus) == (archs, missing)


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
    """setup.py's plan on a machine with these GPUs, this torch and this toolkit."""

    def decide(env=None, gpus=(), cuda="13.0", toolkit="13.0"):
        fake = SimpleNamespace(
            __version__="2.14.1",
            version=SimpleNamespace(cuda=cuda),
            cuda=SimpleNamespace(
                device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
            ),
        )
        monkeypatch.setattr(setup_py, "import_torch", lambda: fake)
        home = tmp_path / f"cuda-{toolkit}"
        if toolkit and not home.exists():
            make_toolkit(home, toolkit)
        return setup_py.plan({"CUDA_HOME": str(home), **(env or {})})

    return decide


FORCED = {"GEMMA4_KERNELS_BUILD": "cuda"}


def test_builds_for_the_gpus_it_sees(decide, tmp_path):
    plan = decide({"TORCH_CUDA_ARCH_LIST": "8.0"}, gpus=[(9, 0), (7, 5)])
    assert (plan.archs, plan.reason) == (("sm_90a",), None)
    assert (plan.toolkit, plan.toolkit_version) == (tmp_path / "cuda-13.0", "13.0")
    assert str(plan) == "building CUDA kernels for sm_90a (there are none for capability 7.5)"


def test_builds_for_the_list_where_it_sees_none(decide):
    assert decide({"TORCH_CUDA_ARCH_LIST": "8.0;9.0"}).archs == ("sm_80", "sm_90a")


def test_forced_without_a_list_is_all(decide):
    assert decide(FORCED).archs == ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")
    assert decide({**FORCED, "TORCH_CUDA_ARCH_LIST": "9.0"}).archs == ("sm_90a",)


@pytest.mark.parametrize(
    "machine, reason",
    [
        ({}, "torch sees no GPU and TORCH_CUDA_ARCH_LIST is not set"),
        ({"cuda": None, "gpus": [(9, 0)]}, "torch 2.14.1 is a build without CUDA"),
        ({"gpus": [(7, 5)]}, "there are no kernels for compute capability 7.5"),
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
            decide(FORCED, **machine)
        assert reason in str(error.value)


def test_cpu_is_forced(decide):
    plan = decide({"GEMMA4_KERNELS_BUILD": "cpu"}, gpus=[(9, 0)])
    assert (plan.archs, plan.reason) == ((), "GEMMA4_KERNELS_BUILD is cpu")


def test_other_values_are_errors(decide):
    with pytest.raises(ValueError, match="GEMMA4_KERNELS_BUILD must be cuda or cpu, got 'yes'"):
        decide({"GEMMA4_KERNELS_BUILD": "yes"})
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST must name .* got '7.5'"):
        decide({"TORCH_CUDA_ARCH_LIST": "7.5"})


def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plan = setup_py.plan({})
    assert plan.reason.startswith("torch cannot be imported while building (")
    assert plan.reason.endswith("; install torch, then run pip install --no-build-isolation .")
    with pytest.raises(ValueError, match="is cuda, but torch cannot be imported"):
        setup_py.plan(FORCED)


@pytest.mark.skipif(not (PACKAGES / "torch").is_dir(), reason="torch is installed elsewhere")
def test_torch_is_found_behind_build_isolation():
    code = (
        "import runpy, setuptools, sys\n"
        f"sys.path = [p for p in sys.path if p != {str(PACKAGES)!r}]\n"
        f"namespace = runpy.run_path({str(ROOT / 'setup.py')!r})\n"
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
    assert run_main("egg_info") and capsys.readouterr().err == ""


def test_an_error_is_one_line(run_main, monkeypatch):
    monkeypatch.setenv("GEMMA4_KERNELS_BUILD", "gpu")
    with pytest.raises(SystemExit) as exit:
        run_main("bdist_wheel")
    message = "gemma4-kernels: GEMMA4_KERNELS_BUILD must be cuda or cpu, got 'gpu'"
    assert exit.value.code == message


# What the package says of itself


def write_facts(plan, folder: Path) -> Path:
    """Runs the step of setup.py that leaves the facts of the build; returns the package."""
    package = folder / "gemma4_kernels"
    package.mkdir()
    command = setup_py.build_py_with(plan)(Distribution())
    command.ensure_finalized()
    command.build_lib = str(folder)
    command.run()
    return package


BUILT = setup_py.Plan(("sm_80", "sm_90a"), Path("/cuda"), "13.0", "2.14.1")


def test_a_tree_that_was_never_installed(tmp_path):
    build = extension.load(tmp_path)
    assert build.archs == () and "never installed" in build.reason


def test_built_for_the_cpu(tmp_path):
    package = write_facts(setup_py.Plan(reason="torch sees no GPU"), tmp_path)
    (package / "_C.abi3.so").write_text("left by an earlier build")
    reason = "installed without CUDA kernels, because torch sees no GPU"
    assert extension.load(package) == extension.Build(reason=reason)


@pytest.mark.parametrize("content", [None, "not a library"])
def test_a_library_that_does_not_load(tmp_path, content):
    package = write_facts(BUILT, tmp_path)
    if content:
        (package / "_C.abi3.so").write_text(content)
    build = extension.load(package)
    assert (build.archs, build.toolkit, build.abi_target) == (BUILT.archs, "13.0", "2.11")
    assert "the CUDA kernels, built with torch 2.14.1, do not load: " in build.reason
    assert "_C.abi3.so: " in build.reason


def test_a_library_that_loads(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    package = write_facts(BUILT, tmp_path)
    assert extension.load(package) == extension.Build(BUILT.archs, "13.0", "2.11")
    assert loaded == [package / "_C.abi3.so"]
    assert json.loads((package / "_build.json").read_text())["built_with"] == "2.14.1"


def test_build_info():
    info = gemma4_kernels.build_info()
    assert set(info) == {
        *(
            "version",
            "torch",
            "cuda",
            "reason",
            "archs",
            "toolkit",
            "abi_target",
            "device",
            "kernels",
        )
    }
    assert info["version"] == gemma4_kernels.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"] is (info["reason"] is None)
    if info["cuda"]:
        assert info["archs"] and info["toolkit"] and info["abi_target"] == "2.11"
        assert extension.ops_in(gemma4_kernels.library.COMPILED)
    else:
        assert isinstance(info["reason"], str)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    assert info["device"] == gpu


@pytest.mark.parametrize(
    "arch, runs, others",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0), (12, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (13, 0)]),
        ("compute_80", [(8, 0), (8, 6), (9, 0), (11, 0), (12, 1), (13, 0)], [(7, 5)]),
    ],
)
def test_what_code_runs_where(arch, runs, others):
    assert all(extension._runs_on(arch, capability) for capability in runs)
    assert not any(extension._runs_on(arch, capability) for capability in others)


@pytest.fixture
def with_gpu(monkeypatch):
    """A process with a library for sm_80 and sm_90a and a GPU of the given capability."""

    def with_gpu(capability, reason=None):
        build = extension.Build(BUILT.archs, "13.0", "2.11", reason)
        monkeypatch.setattr(extension, "BUILD", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        extension.covers.cache_clear()

    yield with_gpu
    extension.covers.cache_clear()


def test_covers(with_gpu):
    with_gpu((8, 6))
    assert extension.covers(torch.device("cuda", 0))
    assert not extension.covers(torch.device("cpu"))
    with_gpu((8, 6), reason="it does not load")
    assert not extension.covers(torch.device("cuda", 0))


def test_a_gpu_that_is_not_covered_is_named_once(with_gpu):
    with_gpu((7, 5))
    sentence = r"eager torch on cuda:1 \(A GPU\): its compute capability is 7.5.*for sm_80, sm_90a"
    with pytest.warns(UserWarning, match=sentence):
        assert not extension.covers(torch.device("cuda", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.covers(torch.device("cuda", 1))


# What the compiler made of the kernels


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(kernels):
    """But for those with wgmma, which are for Hopper."""
    made = {(kernel.name, kernel.arch) for kernel in kernels}
    assert made == {
        (name, arch)
        for name, _ in made
        for arch in (compiled.ARCHS if "HopperTile" not in name else ["sm_90a"])
    }
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
