"""Decoding step by step over one cache: fixed memory, nothing read on the host, a CUDA graph."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gemma4_kernels import dependent_launches
from gemma4_kernels.fusion import why_called

from . import compiled
from .cache import Cache
from .steps import DecodePlan

if TYPE_CHECKING:
    from .generate.sampling import Sampler
    from .model import Gemma4ForCausalLM


class Decoder:
    """Takes every row of a batch one token further with each call.

    decoder(ids [B]) caches the tokens and returns the logits [B, V] of the next ones, like
    `model(ids[:, None], cache=cache).logits[:, -1]`. The memory of `steps` calls is reserved at
    once. On a GPU the first call captures the step as a CUDA graph, and each call overwrites the
    logits of the one before. Between two calls nothing else may write to the cache.

    With a sampler the choice of the next tokens belongs to the step: decoder(sampler.ids) leaves
    them in sampler.ids, and the logits that it returns may lack their cap.

    compile: on a CPU, all steps but the first run as C++ that torch.compile makes of them, once in
    a process for each model, dtype and batch size. It adds up and rounds in another order: logits
    are as near to float64 as before, but not the same bits. Raises RuntimeError where there is no
    C++ compiler, ValueError on a GPU.
    """

    def __init__(
        self,
        model: "Gemma4ForCausalLM",
        cache: Cache,
        steps: int,
        sampler: "Sampler | None" = None,
        compile: bool = False,
    ):
        cache.check(model.config, cache.batch_size, model.compute_dtype, model.device)
        cache.reserve(max(cache.lengths) + steps)
        if compile:
            compiled.prepare(cache)
            watched = _watched(model)
            if watched is not None:
                warnings.warn(f"decoding is not compiled: {watched}", stacklevel=3)
                compile = False
        self.model, self.cache, self.sampler = model, cache, sampler
        self.plan = DecodePlan(cache)
        own = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.device)
        self.ids = own if sampler is None else sampler.ids
        self.first, self.compile = True, compile
        self.cap = 0.0  # of the logits, which the sampler applies
        # The step's graph, and the logits that it writes.
        self.captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, ids_B: Tensor) -> Tensor:
        """Raises ValueError for another number of rows, or when the reserved memory is full."""
        if ids_B.shape != self.ids.shape:
            raise ValueError(f"ids must be {list(self.ids.shape)}, got {list(ids_B.shape)}")
        room = self.cache.room
        if room is not None and room < 1:
            raise ValueError(
                f"the cache is full: its longest row holds {max(self.cache.lengths)} tokens, which "
                "is all that was reserved for this decoder"
            )
        if self.first and self.cache.device.type == "cuda":
            self._capture(ids_B)
        if self.captured is None:
            logits = self._step(ids_B)
        else:
            if ids_B is not self.ids:
                self.ids.copy_(ids_B)
            graph, logits = self.captured
            graph.replay()
        self.first = False
        self.cache.count_one()
        return logits

    def forward(self, ids_B: Tensor) -> Tensor:
        """The step up to its logits, without their cap for a sampler: what may be compiled."""
        if self.sampler is None:
            return self.model(ids_B[:, None], cache=self.plan).logits[:, -1]
        logits, self.cap = self.model.next_logits(ids_B, self.plan)
        return logits

    def _step(self, ids_B: Tensor) -> Tensor:
        """What a graph captures. The first asks which modules are plain, and is not compiled."""
        forward = compiled.step if self.compile and not self.first else Decoder.forward
        logits = forward(self, ids_B)
        if self.sampler is not None:
            self.sampler.choose(logits, self.plan.positions, self.cap)
        return logits

    def _capture(self, ids_B: Tensor) -> None:
        """Runs the step once, for libraries set themselves up in the first run, and captures it.

        Writes what the replay writes again, and so leaves out the sampler, which has chosen the
        tokens before these and needs no setting up. Hooks would be captured with it and never run
        again, and eager twins that read values on the host cannot be captured: a warning names the
        first of them, and the steps run as they are.
        """
        watched = _watched(self.model)
        if watched is not None:
            warnings.warn(f"decoding runs without a CUDA graph: {watched}", stacklevel=4)
            return
        device, before = self.cache.device, torch.cuda.get_sync_debug_mode()
        if ids_B is not self.ids:
            self.ids.copy_(ids_B)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(side):
                self.forward(self.ids)
        except RuntimeError as error:
            warnings.warn(f"decoding runs without a CUDA graph: {error}", stacklevel=4)
            return
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream(device).wait_stream(side)
        self.plan.rewind()
        graph = torch.cuda.CUDAGraph()
        # Such a weight is made anew for each call, by the kernel before the one that reads it.
        made = any(map(is_parametrized, self.model.modules()))
        with torch.cuda.graph(graph), dependent_launches(not made):
            logits = self._step(self.ids)
        self.captured = graph, logits


def _watched(model: nn.Module) -> str | None:
    """The first module whose calls somebody wants to see, which a graph would not show."""
    for name, module in model.named_modules():
        reason = why_called(module)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return None
