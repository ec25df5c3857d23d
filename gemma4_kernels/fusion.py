"""When a fused op may stand in for modules: one rule for every model that runs on these ops.

A fused op reads the parameters of several modules and calls none of them. Whatever hangs on a call
(a hook, an adapter, a quantised or sharded weight, an offloading wrapper) would be passed over
without a word, so an op takes the place of plain modules alone; others are called, one by one.
"""

from typing import TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks_of_all

M = TypeVar("M", bound=nn.Module)
Classes: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def why_called(module: nn.Module) -> str | None:
    """What wants to see calls of `module`: hooks, or a forward of its own; None if nothing does."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    if (
        _hooks_of_all._global_forward_hooks
        or _hooks_of_all._global_forward_pre_hooks
        or _hooks_of_all._global_backward_hooks
        or _hooks_of_all._global_backward_pre_hooks
    ):
        return "is under hooks of all modules"
    if "forward" in own or "_compiled_call_impl" in own:
        return "has a forward of its own"
    return None


def why_seen(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """What else could see the keyword arguments of a call of `module`, a `cls`; None if nothing."""
    if type(module) is not cls:
        return f"is a {type(module).__name__}"
    own = module.__dict__
    if "forward" in own or "_compiled_call_impl" in own:
        return "has a forward of its own"
    if (
        own["_forward_hooks_with_kwargs"]
        or own["_forward_pre_hooks_with_kwargs"]
        or _hooks_of_all._global_forward_hooks_with_kwargs
    ):
        return "has hooks that see keyword arguments"
    return None


def why_not_plain(
    module: nn.Module, cls: Classes, device: torch.device | None = None
) -> str | None:
    """What speaks against reading the parameters of `module` in place of calling it, or None.

    A module is plain if it is exactly a `cls` (or one of them), with no hooks of any kind (its own
    or all modules'), no forward of its own (an offloading wrapper's, a compiled one), no
    parametrization, and parameters that are ordinary tensors, on `device` if one is given. Costs
    0.4 µs; asked anew at every call, for tools put hooks on and take them off between any two.
    """
    if type(module) is not cls and not (type(cls) is tuple and type(module) in cls):
        return f"is a {type(module).__name__}"
    reason = why_called(module)
    if reason is not None:
        return reason
    for name, parameter in module.__dict__["_parameters"].items():
        if parameter is None:
            continue
        if type(parameter) not in _PLAIN_TENSORS:
            return f"has a {type(parameter).__name__} as {name}"
        if device is not None and parameter.device != device:
            return f"has its {name} on {parameter.device}"
    return None


def is_plain(
    module: nn.Module, cls: type[M] | tuple[type[M], ...], device: torch.device | None = None
) -> TypeGuard[M]:
    """Whether `why_not_plain` finds nothing."""
    return why_not_plain(module, cls, device) is None


def why_not_fused(module: nn.Module, cls: Classes) -> str | None:
    """The same of `module` and of all its parts; None if all are plain.

    PARTS of its class, where there is one, names the submodules and what each has to be.
    """
    reason = why_not_plain(module, cls)
    if reason is not None:
        return reason
    children = module.__dict__["_modules"]
    for name, part in getattr(type(module), "PARTS", {}).items():
        child = children.get(name)
        if child is not None and (reason := why_not_fused(child, part)) is not None:
            return f"{name} {reason}"
    return None
