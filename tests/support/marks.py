"""On which dtypes a test runs, and where it is skipped."""

import pytest

from . import emulated
from .backends import BF16, FP16, FP32, FP64, Backend

DTYPES = [FP32, BF16, FP16, FP64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

NO_COMPILER = "no C++ compiler to build the emulated kernels with"
needs_compiler = pytest.mark.skipif(not emulated.has_compiler(), reason=NO_COMPILER)


def emulated_backend() -> Backend:
    """Where nothing can build it, the test is skipped."""
    if not emulated.has_compiler():
        pytest.skip(NO_COMPILER)
    return Backend("emulated", "cpu", emulated.ops())
