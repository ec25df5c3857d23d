"""Whether kernels may start while those before them still run."""

import contextlib
import threading
from collections.abc import Iterator

from . import opset


class _State(threading.local):
    forbidden = False


_state = _State()


@contextlib.contextmanager
def dependent_launches(allowed: bool = True) -> Iterator[None]:
    """Lets the kernels that this thread launches inside start while the one before them still runs.

    That is CUDA's programmatic dependent launch. It is there from compute capability 9.0 on and
    hides what it costs to start a kernel; elsewhere nothing changes. A kernel asks for its weights
    before it waits for the one before it, so inside, nothing may write what an op is then given as
    a weight. Results are the same to the bit.

    Off until it is asked for, as the CUDA graph of a `gemma4` model's decoding step does. With
    `allowed` False it stays off for whatever is run or captured inside, that graph too:

        with gemma4_kernels.dependent_launches(False):
            model.generate(ids)
    """
    kernels, outer = opset.kernels, _state.forbidden
    _state.forbidden = outer or not allowed
    before = kernels.set_dependent_launches(not _state.forbidden)
    try:
        yield
    finally:
        _state.forbidden = outer
        kernels.set_dependent_launches(before)
