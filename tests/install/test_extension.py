"""What the installed package says of its compiled library, and which it does not open."""

import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import compiled
import pytest
import torch

import gemma4_kernels
from gemma4_kernels import extension
from gemma4_kernels.fingerprint import fingerprint

setup_py = compiled.setup_py

PACKAGE = Path(gemma4_kernels.__file__).parent
BUILT = setup_py.Plan(("sm_80", "sm_90a"), Path("/cuda"), "13.0", "2.14.1")
# A small shared library that loads under this torch.
LIBRARY = Path(torch._C.__file__).read_bytes()


def install(folder: Path, library: bytes = LIBRARY) -> Path:
    """Leaves a library and the facts of its build; returns the library's place."""
    path = folder / "_C.abi3.so"
    path.write_bytes(library)
    setup_py.write_facts(BUILT, folder)
    return path


def why_not_loaded(folder: Path) -> str:
    build = extension.load(folder)
    assert (build.archs, build.toolkit, build.abi_target) == (BUILT.archs, "13.0", "2.11")
    beginning = "the CUDA kernels, built with torch 2.14.1, do not load: "
    assert build.reason.startswith(beginning)
    return build.reason.removeprefix(beginning)


# The library


def test_a_tree_that_was_never_installed(tmp_path):
    build = extension.load(tmp_path)
    assert build.archs == () and "never installed" in build.reason


def test_built_for_the_cpu(tmp_path):
    install(tmp_path).write_text("left by an earlier build")
    setup_py.write_facts(setup_py.Plan(reason="torch sees no GPU"), tmp_path)
    reason = "installed without CUDA kernels, because torch sees no GPU"
    assert extension.load(tmp_path) == extension.Build(reason=reason)


def test_a_library_that_loads(tmp_path):
    install(tmp_path)
    assert extension.load(tmp_path) == extension.Build(BUILT.archs, "13.0", "2.11")


@pytest.fixture
def unopened(monkeypatch):
    """Fails where a library is given to the loader, which may die of it."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"opened {path}"))


@pytest.mark.parametrize("size", [0, 64, 4096, len(LIBRARY) - 1, len(LIBRARY) + 1])
def test_a_library_of_another_size_is_not_opened(tmp_path, unopened, size):
    library = install(tmp_path)
    library.write_bytes((LIBRARY + b"\0")[:size])
    assert why_not_loaded(tmp_path) == (
        f"{library} has {size} bytes and was built with {len(LIBRARY)}: run pip install"
    )


@pytest.mark.parametrize("zeros", [slice(None), slice(0, 1), slice(4096, 8192), slice(-1, None)])
def test_a_library_that_has_changed_is_not_opened(tmp_path, unopened, zeros):
    content = bytearray(b"x" + LIBRARY + b"x")
    library = install(tmp_path, bytes(content))
    content[zeros] = bytes(len(content[zeros]))
    library.write_bytes(content)
    reason = f"{library} has changed since it was built: run pip install"
    assert why_not_loaded(tmp_path) == reason


def test_no_hole_of_64_kb_escapes(tmp_path):
    """What an interrupted copy or a lost extent leaves, in a file of a real library's order."""
    content = random.Random(0).randbytes(3 * 10**6)
    path = tmp_path / "library"
    path.write_bytes(content)
    whole = fingerprint(path)
    with path.open("r+b") as file:
        for start in [*range(0, len(content) - 2**16, 12345), len(content) - 2**16]:
            file.seek(start)
            file.write(bytes(2**16))
            file.flush()
            assert fingerprint(path) != whole, start
            file.seek(start)
            file.write(content[start : start + 2**16])
    assert fingerprint(path) == whole


def test_no_library_a_folder_or_a_link_to_nowhere_in_its_place(tmp_path, unopened):
    library = install(tmp_path)
    library.unlink()
    assert why_not_loaded(tmp_path) == f"[Errno 2] No such file or directory: '{library}'"
    library.symlink_to(tmp_path / "nowhere")
    assert why_not_loaded(tmp_path) == f"[Errno 2] No such file or directory: '{library}'"
    library.unlink()
    library.mkdir()
    assert why_not_loaded(tmp_path) == f"[Errno 21] Is a directory: '{library}'"


def test_a_library_that_may_not_be_read(tmp_path, unopened, monkeypatch):
    library = install(tmp_path)
    path_open = Path.open

    def refuse(self, *args, **kwargs):
        if self == library:
            raise PermissionError(13, "Permission denied", str(self))
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert why_not_loaded(tmp_path) == f"[Errno 13] Permission denied: '{library}'"


def test_a_library_for_another_machine(tmp_path):
    """What the loader itself refuses without harm: here the processor in the ELF header."""
    library = install(tmp_path, LIBRARY[:18] + b"\xfe\xca" + LIBRARY[20:])
    assert f"{library}: " in why_not_loaded(tmp_path)


def test_a_library_for_another_torch(tmp_path):
    """It calls what this torch does not have."""
    assert b"\0initModule\0" in LIBRARY
    library = install(tmp_path, LIBRARY.replace(b"\0initModule\0", b"\0initModulo\0"))
    assert why_not_loaded(tmp_path) == f"{library}: undefined symbol: initModulo"


@pytest.mark.parametrize(
    "facts",
    [
        *("", "{", "[]", "{}", "5", "null", '"archs"', '{"archs": 5}', '{"archs": []}'),
        # What versions wrote that noted no fingerprint.
        '{"archs": ["sm_80"], "toolkit": "13.0", "built_with": "2.14.1", "abi_target": "2.11"}',
    ],
)
def test_facts_that_no_build_writes(tmp_path, unopened, facts):
    install(tmp_path)
    (tmp_path / "_build.json").write_text(facts)
    build = extension.load(tmp_path)
    assert build.archs == ()
    assert build.reason.startswith(f"{tmp_path}/_build.json is not what a build writes (")
    assert build.reason.endswith("): run pip install")


def test_eager_twins_serve_where_the_library_is_damaged(tmp_path):
    package = tmp_path / "gemma4_kernels"
    package.mkdir()
    for source in PACKAGE.rglob("*.py"):
        target = package / source.relative_to(PACKAGE)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.symlink_to(source)
    install(package).write_bytes(LIBRARY[: len(LIBRARY) // 2])
    code = (
        "import gemma4_kernels, torch\n"
        "print(gemma4_kernels.rms_norm(torch.full((1, 8), 4.0), torch.ones(8)).sum().item())\n"
        "print(gemma4_kernels.build_info()['reason'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    total, reason = done.stdout.splitlines()
    assert float(total) == pytest.approx(8.0, rel=1e-5)
    assert re.search(r"_C\.abi3\.so has \d+ bytes and was built with \d+: run pip install$", reason)


# What it says


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
            "checked",
            "kernels",
        )
    }
    assert info["version"] == gemma4_kernels.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"] is (info["reason"] is None)
    if info["cuda"]:
        assert info["archs"] and info["toolkit"] and info["abi_target"] == "2.11"
        assert gemma4_kernels.opset.kernels.names
    else:
        assert isinstance(info["reason"], str)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    assert info["device"] == gpu


@pytest.mark.parametrize(
    "arch, runs, others",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0), (10, 0), (12, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (10, 1), (11, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (13, 0)]),
        ("compute_80", [(8, 0), (8, 7), (9, 0), (11, 0), (12, 1), (13, 0)], [(7, 5)]),
    ],
)
def test_what_code_runs_where(arch, runs, others):
    assert all(extension._runs_on(arch, capability) for capability in runs)
    assert not any(extension._runs_on(arch, capability) for capability in others)


@pytest.fixture
def with_gpu(monkeypatch):
    """A process with a library for sm_80 and sm_90a and a GPU of the given capability."""

    def with_gpu(capability, reason=None, archs=BUILT.archs):
        build = extension.Build(archs, "13.0", "2.11", reason)
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


@pytest.mark.parametrize("capability", [(8, 7), (10, 1), (11, 0), (13, 0)])
def test_ptx_covers_tegra_and_later_cards(with_gpu, capability):
    with_gpu(capability, archs=("sm_80", "compute_80"))
    assert extension.covers(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (13, 0)])
def test_a_gpu_that_is_not_covered_is_named_once(with_gpu, capability):
    with_gpu(capability)
    sentence = (
        r"eager torch on cuda:1 \(A GPU\): its compute capability is "
        + "{}.{}.*for sm_80, sm_90a".format(*capability)
    )
    with pytest.warns(UserWarning, match=sentence):
        assert not extension.covers(torch.device("cuda", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.covers(torch.device("cuda", 1))
