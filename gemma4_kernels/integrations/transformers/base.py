"""What all of the plug-in goes by: its name, the versions of transformers, and when ops run."""

import transformers
from torch import Tensor

NAME = "gemma4_kernels"
# The first version that fits and the first that may not; the project's metadata says the same.
VERSIONS = ((5, 24), (6, 0))
TanhGELU = type(transformers.activations.ACT2FN["gelu_pytorch_tanh"])


def check_version() -> None:
    """Raises RuntimeError under a transformers that this was not made for."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        (first, since), (before, _) = VERSIONS
        raise RuntimeError(
            f"gemma4_kernels.integrations.transformers needs transformers >= {first}.{since}, "
            f"< {before}, got {transformers.__version__}"
        )


def takes_ops(x: Tensor) -> bool:
    """Whether to run these ops on x, or what transformers would run without them.

    On a CPU there is no kernel, and an eager twin's checks and shapes cost time. Asked at every
    call, for a model may move.
    """
    return not x.is_cpu
