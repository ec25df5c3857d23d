"""What attention gives for one sequence, beside float64."""

import torch

from . import float64
from .expect import assert_close_to_float64


def check(actual, q, k, v, dtype=torch.bfloat16, **options):
    """Against the exact result; unavoidable is the error of p and out rounded once each."""
    out, lse = actual
    exact_out, exact_lse = float64.attention(q, k, v, **options)
    rounded, _ = float64.attention(q, k, v, **options, dtype=dtype)
    assert_close_to_float64(out, exact_out, dtype, rounded=rounded, magnitude=v.abs().max())
    if lse is not None:
        size = 1 + exact_lse.abs().max()
        assert_close_to_float64(lse, exact_lse, torch.float32, terms=k.shape[0], magnitude=size)
