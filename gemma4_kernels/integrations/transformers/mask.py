"""What each layer is told about its mask.

transformers asks the function here for a mask, and it never builds one for what the kernels can do
by themselves. What it hands to each layer is one of

    None                     causal, the queries being the last keys
    int [B, 1, N, 1]         causal, query n of row b sees keys before that number (a static cache)
    int [B, 1, N, 2]         the same from a first key on (padding)
    int [B, 1, N, M > 2]     packed rows: where a row's sequences start, padded with N
    floating [B, 1, N, S]    anything else, which torch's attention computes, with a warning

4-d all of them, for transformers slices dimension 2 where layers share keys. A layer may also be
handed a mask that the user made: bool (True: seen) or floating (added to the scores) [B, 1, N, S].
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask

# What a mask function of transformers may be made of, for a mask that the kernels do themselves.
KNOWN = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls to make a mask; see the top of this file for what it makes.

    Query n stands at position q_offset + n, key j at kv_offset + j; attention_mask [B, positions]
    is False for padding. mask_function(row, head, query, key) says what mask is wanted; its window
    is the layer's. Raises ValueError for padding that is not at the ends.
    """
    if torch.compiler.is_compiling():  # which cannot look into a function made under it
        # transformers allows the skip where the mask is causal, causal in a window, or in chunks.
        in_chunks = getattr(kwargs.get("config"), "attention_chunk_size", None)
        known = mask_function is causal_mask_function or (allow_is_causal_skip and not in_chunks)
        packed = None
    else:
        conditions = _conditions(mask_function)
        known = "causal_mask_function" in conditions and conditions.keys() <= KNOWN
        packed = conditions.get("packed_sequence_mask_function")
    if not known:
        return eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # theirs adds it to a tensor
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=device,
            **kwargs,
        )
    if packed is not None:
        return _starts(_held(packed)["packed_sequence_mask"])
    # Reads the device, as transformers does for sdpa; a compiler cannot, and takes the bounds.
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if attention_mask is None and at_the_end:
        return None
    end = torch.arange(1, q_length + 1, device=device) + q_offset - kv_offset
    end = end.clamp(max=kv_length).expand(batch_size, 1, q_length).unsqueeze(-1)
    if attention_mask is None:
        return end.int()
    first = _first_real(attention_mask) - kv_offset
    return torch.cat([first.clamp(min=0)[:, None, None, None].expand_as(end), end], -1).int()


def _held(function: Callable[..., object]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def _conditions(function: Callable[..., object]) -> dict[str, Callable[..., object]]:
    """What a mask function demands, each under the name of the function that made it."""
    name = function.__qualname__.partition(".")[0]
    if name == "and_masks":
        parts = _held(function).get("mask_functions", ())
        return {k: v for part in parts for k, v in _conditions(part).items()}
    # Positions instead of places: the same within a sequence, and sequences are a condition apart.
    if name == "remap_positions_for_packed_sequence":
        return _conditions(_held(function)["mask_function"])
    return {name: function}


def _starts(sequence_BN: Tensor) -> Tensor:
    """From the number of each token's sequence, where the sequences start: int [B, 1, N, M].

    Reads the device for M, the most sequences of a row, but at least 3: fewer numbers say bounds.
    """
    length = sequence_BN.shape[1]
    begins = F.pad(sequence_BN.diff(dim=1) != 0, (1, 0), value=True)
    places = torch.arange(length, dtype=torch.int32, device=begins.device).expand_as(begins)
    starts = places.masked_fill(~begins, length).sort(1).values[:, : int(begins.sum(1).max())]
    starts = F.pad(starts, (0, max(0, 3 - starts.shape[1])), value=length)
    return starts[:, None, None].expand(-1, 1, length, -1)


def _first_real(attention_mask: Tensor) -> Tensor:
    """The position [B] of each row's first token that is no padding."""
    keep = attention_mask.bool()
    first = keep.int().argmax(-1)
    # A run of ones begins once. Zeros after it are of no concern: no real query comes later.
    starts = keep[:, :1].sum(-1) + (keep[:, 1:] & ~keep[:, :-1]).sum(-1)
    whole = (starts <= 1).all()
    sentence = "attention_mask must be one run of ones per row (left or right padding)"
    if keep.is_cpu and not torch.compiler.is_compiling():
        if not whole:
            raise ValueError(sentence)
    else:
        torch._assert_async(whole, sentence)
    return first
