"""How a call of each op's backward is made behind a call of the op, as in `cases.py`."""

import torch
from torch import Tensor

from gemma4_kernels import opset

from . import cases
from .backends import Backend


def rms_norm_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    """Behind a call of the forward, with every gradient wanted, as in the others."""
    arguments = cases.complete("rms_norm", forward)
    given = arguments | {"grad": torch.randn_like(arguments["x"])}
    return _backward_of("rms_norm", given)


def add_rms_norm_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    arguments = cases.complete("add_rms_norm", forward)
    new_residual, y = b.ops.add_rms_norm(**arguments)
    given = arguments | {"new_residual": new_residual.detach()}
    given["grad_residual"] = torch.randn_like(given["new_residual"])
    return _backward_of(
        "add_rms_norm", given | {"grad_y": None if y is None else torch.randn_like(y)}
    )


def moe_norm_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    given = cases.complete("moe_norm", forward)
    y, router_x = b.ops.moe_norm(**given)
    grads = {"grad_y": torch.randn_like(y), "grad_router_x": torch.randn_like(router_x)}
    return _backward_of("moe_norm", given | grads)


def qkv_norm_rope_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    given = cases.complete("qkv_norm_rope", forward)
    q, k = given["q"], given["k"]
    given["grad_q"] = torch.randn_like(q)
    for name in ("grad_k", "grad_v"):
        given[name] = None if k is None else torch.randn_like(k)
    return _backward_of("qkv_norm_rope", given)


def attention_prefill_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    """Behind a call of the forward."""
    out, lse = b.ops.attention_prefill(**forward | {"return_lse": True})
    arguments = cases.complete("attention_prefill", forward) | {
        "out": out.detach(),
        "lse": lse.detach(),
    }
    arguments |= {"grad_out": torch.randn_like(out), "grad_lse": torch.randn_like(lse)}
    return {name: arguments[name] for name in opset.OPS["attention_prefill_backward"].names}


def moe_experts_backward(b: Backend, forward: cases.Arguments, *wanted: bool) -> cases.Arguments:
    """Behind a call of the forward; `wanted`: of x, gate_up, down and weights, all unless given."""
    given = cases.complete("moe_experts", forward) | {"grad": torch.randn_like(forward["x"])}
    names = opset.OPS["moe_experts_backward"].names
    given |= zip(names[-4:], wanted or (True,) * 4, strict=True)
    return {name: given[name] for name in names}


def softcap_cross_entropy_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    """Behind a call of the forward, into a tensor of its own."""
    arguments = {n: x.detach() if isinstance(x, Tensor) else x for n, x in forward.items()}
    nll, lse = b.ops.softcap_cross_entropy(**arguments)
    grads = dict(lse=lse, grad_nll=torch.randn_like(nll), grad_lse=torch.randn_like(nll))
    d_logits = torch.empty_like(arguments["logits"], memory_format=torch.contiguous_format)
    return cases.complete(
        "softcap_cross_entropy_backward", arguments | grads | {"d_logits": d_logits}
    )


def geglu_backward(b: Backend, forward: cases.Arguments, op: str = "geglu") -> cases.Arguments:
    """Behind a call of it; all is wanted."""
    arguments = {n: x.detach() if isinstance(x, Tensor) else x for n, x in forward.items()}
    grad = torch.randn_like(getattr(b.ops, op)(**arguments))
    made = arguments | {"grad": grad, "wants_gate": True, "wants_ple": True}
    return {name: made[name] for name in opset.OPS[f"{op}_backward"].names}


def ple_gate_backward(b: Backend, forward: cases.Arguments) -> cases.Arguments:
    return geglu_backward(b, forward, "ple_gate")


def _backward_of(op: str, given: cases.Arguments) -> cases.Arguments:
    """What its backward takes of these, detached; it wants all."""
    names = opset.OPS[f"{op}_backward"].names
    given = given | {name: True for name in names if name.startswith("wants_")}
    values = ((name, given[name]) for name in names)
    return {n: x.detach() if isinstance(x, Tensor) else x for n, x in values}
