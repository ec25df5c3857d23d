"""What all of the plug-in goes by: its name, the versions of transformers, and when ops run."""

import transformers
from torch import Tensor

NAME = "gemma4_kernels"
# The first version that fits, and the first that nobody has tried; pyproject.toml says the same.
VERSIONS = ((5, 15), (5, 25))
TanhGELU = type(transformers.activations.ACT2FN["gelu_pytorch_tanh"])


def check_version() -> None:
    """Raises RuntimeError under a transformers that this was not made for."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        since, before = (".".join(map(str, bound)) for bound in VERSIONS)
        raise RuntimeError(
            f"gemma4_kernels.integrations.transformers needs transformers >= {since}, < {before}, "
            f"got {transformers.__version__}"
        )


def takes_ops(x: Tensor) -> bool:
    """Whether to run these ops on x, or what transformers would run without them.

    On a CPU there is no kernel, and an eager twin's checks and shapes cost time. Asked at every
    call, for a model may move.
    """
    return not x.is_cpu
