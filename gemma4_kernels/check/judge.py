"""Whether a kernel computes what its eager twin states."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..opset import OPS
from ..packed import CODES
from .cases import CASES, HOST, Arguments, Draw


def judged(
    op: str, kernel: Callable[..., Any], device: torch.device
) -> Iterator[tuple[str, str | None]]:
    """Runs the cases of an op: yields the name of each before it runs, and after the first that
    goes wrong its name and what is wrong.

    Each call runs twice, once in memory that holds NaN where nothing was written. What it returns
    and what its arguments hold then must be near the twin's in float64, and have the same bits.
    """
    twin, names, cases = OPS[op].twin, OPS[op].names, CASES[op]
    for dtype in OPS[op].dtypes:
        draws = (Draw(device, dtype), Draw(device, dtype), Draw(HOST, dtype), Draw(HOST, dtype))
        for i, (first, second, host, exact) in enumerate(zip(*map(cases, draws), strict=True)):
            case = f"case {i}, {str(dtype).removeprefix('torch.')}"
            yield case, None
            poisoned, plain = _run(kernel, first, poison=True), _run(kernel, second)
            expected, exact = _run(twin, host), _run(twin, _in_float64(names, exact))
            labels, times = _labels(names, first, expected), 4 if _packed(names, first) else 2
            reason = _why_wrong(labels, times, poisoned, expected, exact)
            if reason is None and not all(map(_same_bits, poisoned, plain)):
                reason = "gives other bits in a second run, or where memory held something else"
            if reason is not None:
                yield case, reason
                return


def _why_wrong(labels: list[str], times: int, *values: list[Tensor]) -> str | None:
    terms = max(n for x in values[0] for n in (1, *x.shape))
    for label, found, expected, exact in zip(labels, *values, strict=True):
        if reason := why_far(found, expected, exact, terms, times):
            return f"gives a wrong {label}: {reason}"
    return None


def why_far(
    found: Tensor, expected: Tensor, exact: Tensor, terms: int, times: int = 2
) -> str | None:
    """What speaks against `found` beside the twin's result in its dtype and in float64.

    With the unit roundoffs u of its dtype and u' of fp32, row by row,
    |found - exact| <= times max |expected - exact| + 2 u max |exact| + 8 u' √terms M:
    twice what the same roundings cost the twin, one rounding more of a value of the row's size, and
    sums of `terms` values in fp32, M being the largest value of all. Four times with packed
    weights, which the twin rounds and a kernel does not: in the twin errors may cancel. Integers
    and what is not finite must be equal.
    """
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        kinds = (f"{x.dtype} {list(x.shape)}" for x in (found, expected))
        return "{} and not {}".format(*kinds)
    if not found.numel():
        return None
    roundoff = torch.finfo(found.dtype).eps / 2 if found.is_floating_point() else 0.0
    inner = torch.finfo(torch.float32).eps / 2 if found.is_floating_point() else 0.0
    found, expected, exact = (x.to(HOST, torch.float64) for x in (found, expected, exact))
    finite = exact.isfinite()
    size, twins_error = (x.where(finite, 0).abs() for x in (exact, expected - exact))
    bound = 8 * inner * terms**0.5 * size.max()
    bound = bound + (times * twins_error + 2 * roundoff * size).amax(-1, keepdim=True)
    equal = (found == exact) | (found.isnan() & exact.isnan())
    bad = ~equal & ~(finite & ((found - exact).abs() <= bound))
    if not bad.any():
        return None
    at = tuple(bad.nonzero()[0].tolist())
    count = f"{int(bad.sum())} of {bad.numel()} values are off"
    return f"{found[at]:.6g} and not {exact[at]:.6g} at {list(at)}, {count}"


def _run(function: Callable[..., Any], arguments: Arguments, poison: bool = False) -> list[Tensor]:
    """The results and, as it leaves them, the arguments."""
    torch.use_deterministic_algorithms(poison)  # which fills new memory
    try:
        results = function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    results = results if isinstance(results, tuple) else (results,)
    return [x for x in (*results, *arguments) if isinstance(x, Tensor)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def _labels(names: list[str], arguments: Arguments, values: list[Tensor]) -> list[str]:
    given = [n for n, x in zip(names, arguments, strict=True) if isinstance(x, Tensor)]
    return [*(f"result {i}" for i in range(len(values) - len(given))), *given]


def _in_float64(names: list[str], arguments: Arguments) -> Arguments:
    # Angles are fp32 by definition; codes and their scales are what they are.
    kept = {"inv_freq", "k_scales", "v_scales", *_packed(names, arguments)}

    def convert(name: str, x: Any) -> Any:
        wide = isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1
        return x.double() if wide and name not in kept else x

    return tuple(map(convert, names, arguments))


def _packed(names: list[str], arguments: Arguments) -> set[str]:
    """The arguments that are parts of packed weights."""
    given, found = dict(zip(names, arguments, strict=True)), set[str]()
    for name in names:
        parts = name, f"{name}_scales", f"{name}_row_scales"
        if parts[-1] in given and given[name].dtype in CODES:
            found |= set(parts)
    return found
