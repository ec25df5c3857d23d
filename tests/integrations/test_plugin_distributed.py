"""Two processes: tensor parallel, DDP and FSDP2 train an enabled model as a plain one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from support.plugged import (
    GOLDEN,
    base,
    close,
    left_padding,
    plugin,
    small,
    some_ids,
    transformers,
)
from support.plugged import way as way
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

IDS, PADDING = some_ids(4, 11), left_padding(4, 11)
IDS[2:], PADDING[2:] = IDS[2:], PADDING[:2]
LABELS = IDS.masked_fill((PADDING == 0) | (PADDING.cumsum(1) == 1), -100)


def trained(model, rows):
    """The loss of some rows, and gradients by name, whole ones."""
    loss = model(IDS[rows], attention_mask=PADDING[rows], labels=LABELS[rows]).loss
    loss.backward()
    gradients = {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda g=p.grad: g)()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return loss.detach(), gradients


def same(ours, theirs):
    (loss, gradients), (expected_loss, expected) = ours, theirs
    close(loss, expected_loss)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1)
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=name
        )


def tensor_parallel():
    for name in ("dense", "e4b_like"):
        results = []
        for enabled in (False, True):
            model = transformers.Gemma4ForCausalLM.from_pretrained(
                GOLDEN / name, tp_plan="auto", attn_implementation="sdpa"
            )
            results.append(trained(plugin.enable(model) if enabled else model, slice(None)))
        same(*reversed(results))


def ddp():
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for name in ("moe", "ple"):
        models = (plugin.enable(small(name)), small(name))
        same(*(trained(DistributedDataParallel(model), rows) for model in models))


def fsdp2():
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for name in ("moe", "ple"):
        results = []
        for order in ("enabled, then sharded", "sharded, then enabled", "plain"):
            model = small(name)
            if order == "enabled, then sharded":
                plugin.enable(model)
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            if order == "sharded, then enabled":
                plugin.enable(model)
            results.append(trained(model, rows))
        same(results[0], results[2])
        same(results[1], results[2])


def fsdp2_in_bf16():
    """What a layer is given is cast with its parameters, cosines with the rest."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("moe", "ple"):
        losses = []
        for make in (small, lambda name: plugin.enable(small(name))):
            model = make(name)
            for layer in model.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            losses.append(trained(model, slice(None))[0])
        torch.testing.assert_close(*losses, atol=0, rtol=torch.finfo(torch.bfloat16).eps / 2)


def rank(number, port, way, checks):
    names = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=2, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    if way == "as on a GPU":
        base.takes_ops = lambda x: True
    dist.init_process_group("gloo")
    for check in checks:
        check()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(way):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        rank, (port, way, (tensor_parallel, ddp, fsdp2, fsdp2_in_bf16)), nprocs=2
    )
