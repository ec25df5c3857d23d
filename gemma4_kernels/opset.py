"""One op, one row: what PyTorch's dispatcher, its compiler and a call need to know of each.

Plain `Library.define`/`impl` and not the `custom_op` decorator, which costs three times as much a
call. A compiled library implements the same schemas in a namespace of its own; `kernels` is the one
in use, and each call runs its kernel if it has one that serves the call, else the eager twin.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .arguments import judge
from .autocast import unaffected

NAMESPACE = "gemma4_kernels"
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)

# An op's arguments, each of the kind that its schema names, and its result.
Args = tuple[Any, ...]
Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...] | None, covariant=True)
T = TypeVar("T")

OPS: dict[str, "Op[Tensor | tuple[Tensor, ...] | None]"] = {}
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Gradient:
    """What is kept of (inputs, output) for the backward, and the backward of (kept, wanted,
    *gradients), where `wanted` says of each input whether its gradient is; the gradient of an
    output that nobody used is None.

    `backward` returns one gradient an input, None where there is none. `in_eager`: it is better
    than what autograd makes of the twin too, as one that keeps less is.
    """

    keep: Callable[[Args, Any], Args]
    backward: Callable[..., tuple[Tensor | None, ...]]
    in_eager: bool = True


@dataclass(frozen=True)
class NoGradient:
    """The backward refuses, and says why."""

    reason: str


class Op(Generic[Result]):
    """An op of the dispatcher, called by the shortest way that serves.

    `check`, `outputs` and `unserved` name the arguments that they want as the schema does. `check`
    raises for what the op does not take; `outputs` makes new tensors of the result's shapes, dtypes
    and devices; `unserved` says why no kernel serves a call, or None. `main` names the argument
    whose device and dtype are the op's, `dtypes` what its kernel computes in, and `beside` the
    arguments with a dtype of their own. Without a `gradient` the twin is run again and
    differentiated.
    """

    def __init__(
        self,
        schema: str,
        twin: Callable[..., Result],
        *,
        outputs: Callable[..., Result],
        check: Callable[..., None] | None = None,
        main: str | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        beside: tuple[str, ...] = (),
        unserved: Callable[..., str | None] | None = None,
        gradient: Gradient | NoGradient | None = None,
    ) -> None:
        arguments = torch._C.parse_schema(schema).arguments
        self.schema, self.name = schema, schema.partition("(")[0]
        self.names = [argument.name for argument in arguments]
        self.twin = unaffected(twin)
        self._judges = [judge(a.name, str(a.type)) for a in arguments]
        self._demands = self._bound(check) if check else _nothing
        self._unserved = self._bound(unserved) if unserved else _nothing
        self._outputs, self.dtypes = self._bound(outputs), dtypes
        self.main = self.names.index(main) if main else 0
        self._beside = [self.names.index(name) for name in beside]
        # A twin that would be differentiated anyway is, on its way forward.
        self._own_gradient = gradient.in_eager if isinstance(gradient, Gradient) else bool(gradient)

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._kernel_or_twin, "CompositeExplicitAutograd")
        self.registered = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self.register_fake(NAMESPACE, _library)
        self._register_gradient(gradient)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Result:
        """Runs the op past the dispatcher, which is for the compiler and for gradients.

        Under the compiler the op is called, so that what depends on values (sequence lengths,
        expert counts) stays out of the graph, unless what it does is `shown`. With gradients it is
        called where the registered one is better than what autograd would make of the twin, as it
        is where a kernel computes.
        """
        if torch.compiler.is_compiling():
            result: Result = shown.get(self.name, self.registered)(*args)
            return result
        self._judge(args)
        if args[self.main].is_meta:
            return self.registered(*args)
        served = kernels.serve(self, args)
        if (served or self._own_gradient) and needs_grad(*args):
            return self.registered(*args)
        return self._run(served, args)

    def check(self, args: Args) -> None:
        """Raises TypeError or ValueError for arguments that the op does not take."""
        self._judge(args)
        self._demands(args)

    def _judge(self, args: Args) -> None:
        for judge_one, value in zip(self._judges, args, strict=True):
            judge_one(value)

    def why_eager(self, args: Args) -> str | None:
        """What keeps the op's kernel, where there is one, from serving this call; None if nothing.

        The arguments may end early, after those that matter here.
        """
        x = args[self.main]
        if x.dtype not in self.dtypes:
            return f"it is for {', '.join(map(str, self.dtypes))}, got {x.dtype}"
        for i in self._beside:
            if args[i] is not None and args[i].dtype not in FLOATS:
                return f"it is for {', '.join(map(str, FLOATS))}, got {args[i].dtype}"
        return self._unserved(args)

    def pays(self, args: Args) -> bool:
        """Whether such a call is no slower than its parts: it has a kernel, or they have none.

        The arguments may end early, after those that matter here. The compiler asks no card.
        """
        if torch.compiler.is_compiling():
            return self.why_eager(args) is None
        device = args[self.main].device
        if self.name in kernels.names and kernels.covers(device):
            return self.name not in kernels.failed(device) and self.why_eager(args) is None
        return self._unserved(args) is None

    def register_fake(self, namespace: str, library: torch.library.Library) -> None:
        def fake(*args: object) -> Result:
            self._demands(args)
            return self._outputs(args)

        torch.library.register_fake(f"{namespace}::{self.name}", fake, lib=library)

    def _kernel_or_twin(self, *args: object) -> Result:
        self._judge(args)
        return self._run(kernels.serve(self, args), args)

    def _run(self, served: bool, args: Args) -> Result:
        if served:
            return kernels.call(self, args)
        self._demands(args)
        return self.twin(*args)

    def _bound(self, function: Callable[..., T]) -> Callable[[Args], T]:
        """The function, given of all the op's arguments those that it names."""
        parameters = inspect.signature(function).parameters
        wanted = [self.names.index(name) for name in parameters if name in self.names]
        return lambda args: function(*map(args.__getitem__, wanted))

    def _register_gradient(self, gradient: Gradient | NoGradient | None) -> None:
        if "!" in self.schema:
            return  # what writes into its arguments can have none

        def save(ctx: _Context, inputs: Args, output: object) -> None:
            ctx.set_materialize_grads(False)
            if isinstance(gradient, Gradient):
                _save(ctx, gradient.keep(inputs, output))
            elif gradient is None:
                _save(ctx, inputs)

        def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if isinstance(gradient, NoGradient):
                raise RuntimeError(f"{self.name} has no backward: {gradient.reason}")
            if all(grad is None for grad in grads):
                return (None,) * len(self.names)
            if isinstance(gradient, Gradient):
                return gradient.backward(_saved(ctx), ctx.needs_input_grad, *grads)
            return self.differentiate_twin(_saved(ctx), ctx.needs_input_grad, grads)

        name = f"{NAMESPACE}::{self.name}"
        torch.library.register_autograd(name, backward, setup_context=save, lib=_library)

    @unaffected
    def differentiate_twin(
        self, saved: Args, wanted: tuple[bool, ...], grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """What autograd makes of the twin, run again."""
        with torch.enable_grad():
            inputs = [
                value.detach().requires_grad_(want) if isinstance(value, Tensor) else value
                for value, want in zip(saved, wanted, strict=True)
            ]
            result = self.twin(*inputs)
            outputs: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [value for value, want in zip(inputs, wanted, strict=True) if want],
                [torch.zeros_like(o) if g is None else g for o, g in pairs],
                allow_unused=True,
            )
        remaining = iter(found)
        return tuple(next(remaining) if want else None for want in wanted)


class Kernels:
    """The compiled implementations in a torch.library namespace, for the devices of `covers`; there
    those that `failed` names are not used, for the reason that it gives."""

    def __init__(
        self,
        namespace: str,
        key: str,
        covers: Callable[[torch.device], bool],
        failed: Callable[[torch.device], Mapping[str, str]] = lambda device: {},
    ) -> None:
        self.covers, self.failed = covers, failed
        # The library's implementations come before their schemas, which no other op is given here.
        registered = set(torch._C._dispatch_get_registrations_for_dispatch_key(key))
        self.names = frozenset(name for name in OPS if f"{namespace}::{name}" in registered)
        self._library = torch.library.Library(namespace, "DEF")
        for name in self.names:
            self._library.define(OPS[name].schema)
            OPS[name].register_fake(namespace, self._library)
        if self.names:
            self._library.define("set_dependent_launches(bool allowed) -> bool")
        self.ops = getattr(torch.ops, namespace)

    def set_dependent_launches(self, allowed: bool) -> bool:
        """For the ops that this thread calls from now on; returns what was so before."""
        return bool(self.names) and self.ops.set_dependent_launches(allowed)

    def serve(self, op: Op[Result], args: Args) -> bool:
        """Whether a kernel serves this call of an op; where there is one that does not, a warning
        says why, once."""
        device = args[op.main].device
        if op.name not in self.names or not self.covers(device):
            return False
        reason = self.failed(device).get(op.name) or op.why_eager(args)
        if reason is not None:
            op.check(args)  # what is no call of the op is refused, and nothing to warn of
            warn(f"{op.name} runs eager torch, without a kernel: {reason}")
        return reason is None

    def call(self, op: Op[Result], args: Args) -> Result:
        """The compiled op; what it refuses is refused in the words of the op's check."""
        try:
            result: Result = getattr(self.ops, op.name)(*args)
            return result
        except RuntimeError as error:
            refusal = error
        op.check(args)
        raise refusal


class NoKernels(Kernels):
    """Every op runs its eager twin, as until a library is looked for."""

    def __init__(self) -> None:
        self.names = frozenset()


kernels: Kernels = NoKernels()


@contextlib.contextmanager
def using(others: Kernels) -> Iterator[None]:
    """Puts other kernels under the ops, for all threads."""
    global kernels
    before, kernels = kernels, others
    try:
        yield
    finally:
        kernels = before


# What a compiler traces in an op's place, by the op's name.
shown: Mapping[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def showing(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Lets a compiler look into some ops, for all threads."""
    global shown
    before, shown = shown, functions
    try:
        yield
    finally:
        shown = before


@functools.cache
def warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=5)


def needs_grad(*args: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An unfilled tensor beside x."""
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _nothing(args: Args) -> None:
    """What an op without a check demands, and what is unserved where a kernel serves all."""


class _Context(Protocol):
    """autograd's, of one call."""

    is_tensor: list[bool]
    plain: list[object]
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _save(ctx: _Context, values: Args) -> None:
    """Keeps tensors and plain values apart, as autograd wants, in their order."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in values]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))


def _saved(ctx: _Context) -> Args:
    tensors = iter(ctx.saved_tensors)
    pairs = zip(ctx.is_tensor, ctx.plain, strict=True)
    return tuple(next(tensors) if is_tensor else plain for is_tensor, plain in pairs)
