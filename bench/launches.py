"""Launches of a steady decode step at batch 1, counted on the emulated kernels: no GPU is needed.

    python bench/launches.py            # all five models
    python bench/launches.py E4B 31B

A line a model: those of a layer of each kind (from..to where layers differ), those after the last
layer (norm and head, the choice of a token, the positions' next) and those of one whole token of
`generate`; with "plugin-" the same of a layer and of one whole forward of transformers' model with
the plug-in, over its static cache. A fused op counts as the kernels that it starts, any other
operator that is no view as one.

The models have their own layers, experts aside, but are narrow; the card is an H100's 132
multiprocessors, and the context 1,024 tokens at most, if none is given.
"""

import argparse
import contextlib
import dataclasses
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import paths  # noqa: F401
import torch
import transformers
from support import emulated
from torch.utils._python_dispatch import TorchDispatchMode

import gemma4.decode
import gemma4.decode_layers
from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.layers import DecoderLayer
from gemma4.presets import RELEASED
from gemma4_kernels.integrations import transformers as plugin
from gemma4_kernels.integrations.transformers import base

NARROW = dict(
    vocab_size=96,
    vocab_size_per_layer_input=96,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    global_head_dim=128,
    dtype="bfloat16",
)
CONTEXT, MULTIPROCESSORS = 1024, 132
# Dispatched, but nothing that a GPU would be given to do.
NO_WORK = {"detach", "_unsafe_view", "empty", "empty_like", "new_empty", "_local_scalar_dense"}


def narrow(name: str) -> Gemma4TextConfig:
    config = Gemma4TextConfig.preset(name)
    options: dict[str, Any] = dict(NARROW)
    if config.num_global_key_value_heads:
        options["num_global_key_value_heads"] = 1
    if config.hidden_size_per_layer_input:
        options["hidden_size_per_layer_input"] = 8
    if config.enable_moe_block:
        options |= dict(num_experts=8, top_k_experts=2, moe_intermediate_size=24)
    return dataclasses.replace(config, **options)


class Launches(TorchDispatchMode):
    """Counts them by the part of the model that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = emulated.control().counts().launches
        result = func(*args, **(kwargs or {}))
        launches = emulated.control().counts().launches - before
        if func.namespace == "aten" and not func.is_view:
            launches = func.overloadpacket.__name__ not in NO_WORK
        self.counts[self.part] += int(launches)
        return result


class _EnoughError(Exception):
    """Ends a generation."""


def steady_step(model: Gemma4ForCausalLM, context: int = CONTEXT) -> dict[str, list[int]]:
    """Launches of one step of `generate` by part, a number for each layer of a kind."""
    launches, steps = Launches(), []
    decode = gemma4.decode.Decoder.__call__

    def counted(run_layer: Callable[..., Any]) -> Callable[..., Any]:
        def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
            launches.part = f"{layer.self_attn.layer_idx} {layer.self_attn.kind.partition('_')[0]}"
            result = run_layer(layer, *args, **kwargs)
            launches.part = "final"
            return result

        return run

    def call(decoder: Any, ids: Any) -> Any:
        steps.append(launches.counts)
        if len(steps) == 3:  # the second step is the first that makes nothing anew
            raise _EnoughError
        launches.counts, launches.part = Counter(), "first"
        return decode(decoder, ids)

    with (
        mock.patch.object(DecoderLayer, "packed", counted(DecoderLayer.packed)),
        mock.patch.object(gemma4.decode_layers, "step", counted(gemma4.decode_layers.step)),
        mock.patch.object(gemma4.decode.Decoder, "__call__", call),
        emulated.one_schedule(),
        contextlib.suppress(_EnoughError),
        launches,
    ):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=context, eos_token_id=[])
    return _by_kind(steps[-1])


def _by_kind(counts: Counter[str]) -> dict[str, list[int]]:
    by_kind: dict[str, list[int]] = defaultdict(list)
    for part, number in counts.items():
        by_kind[part.split()[-1]].append(number)
    return by_kind


@torch.no_grad()
def plugged_step(name: str) -> dict[str, list[int]]:
    """Launches of one step of transformers' model under the plug-in, over a static cache."""
    options = dataclasses.asdict(narrow(name))
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**options))
    plugin.enable(model.bfloat16().eval())
    cache = transformers.StaticCache(model.config, max_cache_len=CONTEXT)
    launches, ids, forward = Launches(), torch.tensor([[3, 4, 5]]), plugin.DecoderLayer.forward

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        kind = layer.config.layer_types[layer.layer_idx].partition("_")[0]
        launches.part = f"{layer.layer_idx} {kind}"
        result = forward(layer, *args, **kwargs)
        launches.part = "final"
        return result

    with (
        mock.patch.object(plugin.DecoderLayer, "forward", counted),
        mock.patch.object(base, "takes_ops", lambda x: True),
        emulated.one_schedule(),
        launches,
    ):
        for _ in range(3):  # the second step is the first that makes nothing anew
            launches.counts, launches.part = Counter(), "first"
            model(ids, cache=cache)
            ids = ids[:, :1]
    return _by_kind(launches.counts)


def counted(name: str, context: int = CONTEXT) -> dict[str, list[int]]:
    """The same of a released model."""
    torch.manual_seed(0)
    return steady_step(Gemma4ForCausalLM(narrow(name)).bfloat16().eval(), context)


def line(name: str) -> str:
    """As in `E4B sliding 7 full 7 first 5 final 3 total 302`, and of the plug-in."""
    words, ours, plugged = [name], counted(name), plugged_step(name)
    for before, by_kind, kinds in (
        ("", ours, ("sliding", "full", "first", "final")),
        ("plugin-", plugged, ("sliding", "full")),
    ):
        for kind in kinds:
            least, most = min(by_kind[kind]), max(by_kind[kind])
            words += [before + kind, str(most) if least == most else f"{least}..{most}"]
        words += [f"{before}total", str(sum(map(sum, by_kind.values())))]
    return " ".join(words)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(RELEASED), metavar="MODEL")
    warnings.simplefilter("error")  # an op without a kernel says so
    emulated.ops()
    emulated.control().settings.sm_count = MULTIPROCESSORS
    for name in parser.parse_args(args).models:
        print(line(name), flush=True)


if __name__ == "__main__":
    main()
