"""The fixtures: the backends that tests run on, the compiled kernels, memory that holds NaN."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import compiled
import pytest
import torch
from support import emulated
from support.backends import CARDS, EAGER, Backend
from support.marks import emulated_backend

from gemma4_kernels import opset

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the processors

BACKENDS = ("eager", "emulated", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-library",
        type=Path,
        help="use this build of the emulated kernels instead of making one",
    )
    parser.addoption(
        "--one-schedule",
        action="store_true",
        help="run each call of an emulated kernel in one order of its threads, not in several",
    )
    parser.addoption(
        "--cuda-library",
        type=Path,
        help="read the kernels in this file instead of compiling them: a build for all GPUs",
    )


def pytest_configure(config: pytest.Config) -> None:
    emulated.given_library = config.getoption("--emulated-library")
    if config.getoption("--one-schedule"):
        del emulated.SCHEDULES[1:]


def _backend(name: str) -> Backend:
    if name == "eager":
        return EAGER
    if name == "emulated":
        return emulated_backend()
    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
        if os.environ.get("GEMMA4_KERNELS_REQUIRE_CUDA") == "1":
            pytest.fail(f"GEMMA4_KERNELS_REQUIRE_CUDA=1, but {reason}")
        pytest.skip(reason)
    return Backend("cuda", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return _backend(request.param)


@pytest.fixture(params=("eager", "cuda"))
def device_backend(request: pytest.FixtureRequest) -> Backend:
    """For what depends on the device and not on the kernels' arithmetic."""
    return _backend(request.param)


@pytest.fixture(scope="session")
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[compiled.Kernel]:
    """Every kernel on every architecture, compiled once for all tests that look at them."""
    if compiled.toolkit() is None:
        pytest.skip("no CUDA toolkit to compile the kernels with")
    if compiled.cuobjdump() is None:
        pytest.skip("no cuobjdump and nvdisasm in the toolkit, triton or NVIDIA's wheels")
    library = request.config.getoption("--cuda-library")
    files = [library] if library else compiled.compile_kernels(tmp_path_factory.mktemp("kernels"))
    made = compiled.read_kernels(files)
    print("\n".join(map(str, made)))
    return made


@pytest.fixture(autouse=True)
def _kernels_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that puts other kernels under the ops leaves those that it found."""
    monkeypatch.setattr(opset, "kernels", opset.kernels)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch allocates without filling it (outputs, workspaces) holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    """The emulated backend on one of CARDS; on "cuda", the GPU that is here."""

    def on_card(name: str) -> Backend:
        if name == "cuda":
            return _backend(name)
        backend, settings = emulated_backend(), emulated.control().settings
        smem_kb, has_wgmma = CARDS[name]
        monkeypatch.setattr(settings, "max_smem_bytes", smem_kb * 1024)
        monkeypatch.setattr(settings, "has_wgmma", has_wgmma)
        return backend

    return on_card


@pytest.fixture
def counted() -> Iterator[ModuleType]:
    """The emulator's controls, counting."""
    emulated_backend()
    control = emulated.control()
    control.settings.profile = True
    control.reset_counts()
    yield control
    control.settings.profile = False
