"""What the op tests share: the backends they run on, and how exact an op must be."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import compiled
import emulated
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gemma4_kernels
from gemma4_kernels import opset

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the processors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Backend:
    """Where a test runs: the device of its tensors and the module whose functions it calls."""

    name: str
    device: str
    ops: ModuleType = gemma4_kernels

    def to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def randn(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        return self.to((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype))

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A norm weight; far enough from 1 that a dropped or shifted one shows."""
        return self.randn(*shape, dtype=dtype, mean=1.0, std=0.3)

    def nan(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.to(torch.full(shape, float("nan"), dtype=dtype))

    def int32(self, *values: int) -> Tensor:
        return self.to(torch.tensor(values, dtype=torch.int32))


BACKENDS = ("eager", "emulated", "cuda")
EAGER = Backend("eager", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-library",
        type=Path,
        help="use this build of the emulated kernels instead of making one",
    )
    parser.addoption(
        "--cuda-library",
        type=Path,
        help="read the kernels in this file instead of compiling them: a build for all GPUs",
    )


def pytest_configure(config: pytest.Config) -> None:
    emulated.given_library = config.getoption("--emulated-library")


NO_COMPILER = "no C++ compiler to build the emulated kernels with"
needs_compiler = pytest.mark.skipif(not emulated.has_compiler(), reason=NO_COMPILER)


def emulated_backend() -> Backend:
    """Where nothing can build it, the test is skipped."""
    if not emulated.has_compiler():
        pytest.skip(NO_COMPILER)
    return Backend("emulated", "cpu", emulated.ops())


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


def in_dtypes(arguments: dict[str, Any], **dtypes: torch.dtype) -> dict[str, Any]:
    """The arguments with some of them, where they are given, in a dtype of their own."""
    cast = {n: arguments[n].to(d) for n, d in dtypes.items() if arguments[n] is not None}
    return arguments | cast


def assert_close_to_float64(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    rounded: Tensor | None = None,
    roundings: int = 1,
    terms: int = 1,
    magnitude: Tensor | float | None = None,
    inner: torch.dtype | None = None,
) -> None:
    """The error against the float64 value is at most twice what rounding to `dtype` makes
    unavoidable, plus what sums and functions cost in `inner` (fp32, for float64 itself).

    Unavoidable is, where the op rounds between its steps, the largest error in a row of `rounded`,
    the same formula in float64 rounded at those points; else `roundings` times the unit roundoff.
    An inner result of `terms` summed values of size `magnitude` (the largest in a row unless
    given) costs eps √terms of that size.
    """
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    actual, expected = actual.detach().double().cpu(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    assert actual.isfinite().equal(finite), "not finite where float64 is"
    actual, expected = actual.where(finite, 0), expected.where(finite, 0)

    info = torch.finfo(dtype)
    unavoidable = roundings * info.eps / 2 * expected.abs()
    if rounded is not None:
        error = (rounded.detach().where(finite, 0) - expected).abs()
        unavoidable = unavoidable + (error.amax(-1, keepdim=True) if error.ndim else error)
    if magnitude is None:
        magnitude = expected.abs().amax(-1, keepdim=True) if expected.ndim else expected.abs()
    if isinstance(magnitude, Tensor):
        magnitude = magnitude.detach().double().cpu()
    inner_eps = torch.finfo(inner or torch.promote_types(dtype, torch.float32)).eps
    subnormal = info.smallest_normal * info.eps
    bound = 2 * (unavoidable + subnormal) + inner_eps * terms**0.5 * magnitude
    excess = (actual - expected).abs() / bound
    worst = excess.argmax()
    assert excess.max() <= 1, (
        f"error is {excess.max():.3g} times the bound: got {actual.flatten()[worst]}, "
        f"float64 gives {expected.flatten()[worst]}, {int((excess > 1).sum())} of "
        f"{excess.numel()} values are off"
    )


def assert_refused(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    """The op refuses these arguments, and its fake (on meta tensors) with the same words."""
    with pytest.raises(error, match=sentence) as by_op:
        function(**arguments)
    swapped = {name: _swap_device(value) for name, value in arguments.items()}
    with pytest.raises(error) as by_fake:
        function(**swapped)
    if not any(isinstance(value, Tensor) and value.is_meta for value in arguments.values()):
        assert str(by_fake.value) == str(by_op.value)


def _swap_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(value, device="cpu") if value.is_meta else value.to("meta")


class NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "_to_copy", "copy_"), name
        return func(*args, **(kwargs or {}))


# KB of shared memory that a block may have, and whether there is wgmma: what kernels depend on.
CARDS = {
    "99 KB": (99, False),
    "163 KB": (163, False),
    "227 KB": (227, False),
    "Hopper": (227, True),
}


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
