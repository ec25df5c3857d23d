"""Faults put into copies of the kernels, each of which a test of the kernel must catch.

FAULTS is {op: {the test that catches them, of the op's own file if it names none:
[(file, what stands there, what to write instead)]}}.
"""

from . import (
    attention,
    attention_backward,
    linear,
    logits,
    mlp,
    moe,
    moe_backward,
    norm,
    norm_backward,
    ple,
    rope,
)

FAMILIES = (attention, attention_backward, linear, logits, mlp, moe, moe_backward, norm)
FAMILIES += (norm_backward, ple, rope)
FAULTS = {op: tests for family in FAMILIES for op, tests in family.FAULTS.items()}
