"""The torch that the kernels are compiled against: asked for, found, or missing."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import compiled
import pytest
import setuptools
import torch
from support.marks import needs_compiler
from support.toolkit import FORCED, make_toolkit

ROOT = compiled.ROOT
PACKAGES = Path(sysconfig.get_path("purelib"))
TORCH = Path(torch.__file__).parent
setup_py = compiled.setup_py


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
