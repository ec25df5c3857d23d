"""Run by two processes over gloo: the model under DDP and FSDP2, against transformers on one.

Prints, from the first process, a line of JSON: each check's name and what went wrong, or null.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from . import pairs, tiny

NAMES = ["dense", "moe", "e_series"]
IDS = tiny.ids(4, 11)
# Each process counts as many labels as the other, so that the mean of its means is the mean.
LABELS = IDS.clone()
LABELS[:, :3] = -100


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model: nn.Module, distributed: bool) -> Tensor:
    part = mine if distributed else lambda x: x
    loss = model(input_ids=part(IDS), labels=part(LABELS), use_cache=False).loss
    loss.backward()
    return loss.detach()


def expect_gradients(model: nn.Module, theirs: nn.Module) -> None:
    expected = pairs.gradients(theirs)
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, f"{name} has no gradient"
        pairs.close(whole(gradient), expected[name], 1e-4)


def sharded(model: nn.Module, **options: object) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def ddp(name: str, **options: bool) -> None:
    theirs, ours = pairs.pair(name)
    train(theirs, distributed=False)
    model = DistributedDataParallel(ours.train(), **options)
    train(model, distributed=True)
    expect_gradients(model, theirs)


def ddp_of_a_static_graph(name: str) -> None:
    ddp(name, static_graph=True)


def ddp_with_checkpointing(name: str) -> None:
    theirs, ours = pairs.pair(name)
    train(theirs, distributed=False)
    ours.train().gradient_checkpointing_enable()
    model = DistributedDataParallel(ours)
    train(model, distributed=True)
    expect_gradients(model, theirs)


def fsdp(name: str, checkpointing: bool = False) -> None:
    """Two steps, so that what the first leaves behind is seen, and inference after them."""
    theirs, ours = pairs.pair(name)
    ours = sharded(ours.train())
    if checkpointing:
        ours.gradient_checkpointing_enable()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (theirs, ours)]
    for _ in range(2):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            train(model, distributed=model is ours)
        expect_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        pairs.close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits, 1e-4)


def fsdp_with_checkpointing(name: str) -> None:
    fsdp(name, checkpointing=True)


def fsdp_in_bf16(name: str) -> None:
    """As far from fp32 as transformers is under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    exact, _ = pairs.pair(name)
    train(exact, distributed=False)
    errors = []
    for model in pairs.pair(name):
        train(sharded(model.train(), mp_policy=policy), distributed=True)
        relative = [
            (whole(g) - pairs.gradients(exact)[n]).norm() / pairs.gradients(exact)[n].norm()
            for n, g in pairs.gradients(model).items()
        ]
        errors.append(torch.stack(relative).median().item())
    theirs, ours = errors
    assert 0 < ours <= 1.25 * theirs, errors


def fsdp_generates(name: str) -> None:
    theirs, ours = pairs.pair(name)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = theirs.generate(IDS[:2], attention_mask=torch.ones_like(IDS[:2]), **options)
    assert torch.equal(sharded(ours).generate(IDS[:2], **options), expected)


def checkpoint(name: str) -> None:
    """Written by a sharded model, read by one that is whole and by one that is sharded."""
    theirs, ours = pairs.pair(name)
    ours = sharded(ours.train())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    train(ours, distributed=True)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        expected = ours.eval()(IDS).logits
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        model_state, optimizer_state = dcp.get_state_dict(ours, optimizer)
        names = {n for n, _ in theirs.named_parameters()}
        assert optimizer_state["state"].keys() == names
        save(dict(model=model_state, optimizer=optimizer_state), checkpoint_id=folders[0])
        for shard in (False, True):
            _, fresh = pairs.pair(name)
            with torch.no_grad():
                for parameter in fresh.parameters():
                    parameter.normal_()
            fresh = sharded(fresh) if shard else fresh
            again = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
            model_state, optimizer_state = dcp.get_state_dict(fresh, again)
            state = dict(model=model_state, optimizer=optimizer_state)
            load(state, checkpoint_id=folders[0])
            dcp.set_state_dict(
                fresh,
                again,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            with torch.no_grad():
                pairs.close(fresh.eval()(IDS).logits, expected)
            for a, b in zip(again.state.values(), optimizer.state.values(), strict=True):
                pairs.close(whole(a["exp_avg"]), whole(b["exp_avg"]))
        dist.barrier()


CHECKS: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        ddp,
        ddp_of_a_static_graph,
        ddp_with_checkpointing,
        fsdp,
        fsdp_with_checkpointing,
        fsdp_in_bf16,
        fsdp_generates,
        checkpoint,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in NAMES:
        for check, function in CHECKS.items():
            torch.manual_seed(0)
            error = None
            try:
                function(name)
            except Exception:
                error = traceback.format_exc()
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            results[f"{check} {name}"] = next((e for e in errors if e), None)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
