"""The eager twin of each op, and its check: the same files as in `ops`.

A twin is plain torch, differentiable and right on every device. It is what runs where no kernel is
compiled, what defines the numbers, and what a reader of a kernel should read first. Arithmetic is
fp32 (fp64 for fp64 inputs) inside and cast where the Gemma 4 reference casts; where dtypes meet, as
they do under autocast, they are promoted as there.

A check says what an op demands of its tensors; it runs before the twin and in the fakes, and takes
arguments by their names in the op's schema. It reads shapes, dtypes and devices only, never a
value, so that it costs no synchronisation and holds under `torch.compile`. What the tensors must
hold is looked at by the twin, which reads it anyway; a kernel does with it what the op's docstring
says.

Shape letters are those of `ops`, and R = H / G.
"""

from .attention import *
from .decode import *
from .linear import *
from .logits import *
from .mlp import *
from .moe import *
from .norm import *
from .ple import *
from .rope import *
