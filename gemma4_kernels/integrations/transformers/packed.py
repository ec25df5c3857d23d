"""Linear layers that other libraries quantised, as packed ones of ours.

A module is known by the tensors that it holds, and no library is imported. What is not held in a
packed form as it is (zero points, act-order, nf4, columns in groups that are no multiple of 32,
scales that a 16-bit float does not hold) stays as it is, and is called.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ...packed import COLUMNS, HALF_SCALES, ROWS, PackedWeight, group_scales, pack
from ...packed_linear import PackedLinear

Quants = tuple[Tensor, Tensor | None, Tensor | None]


def put_packed(model: gemma4.Gemma4TextModel) -> None:
    """Puts PackedLinear in the place of the quantised linear layers of which one can be made."""
    for path, module in list(model.named_modules()):
        weight = packed_weight(module)
        if weight is None:
            continue
        bias = module.bias if isinstance(module.bias, nn.Parameter) else None
        model.set_submodule(path, PackedLinear(weight, bias).train(module.training))


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """The weight of a quantised linear layer, the same numbers; None of another module, of one that
    somebody hooked, and where no packed form holds them."""
    if not isinstance(module, nn.Linear) or isinstance(module, PackedLinear):
        return None
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return None
    for found in _forms(module):
        codes, scales, row_scales = found
        columns = codes.shape[-1] * (8 if codes.dtype == torch.int32 else 1)
        if codes.shape[0] % ROWS or columns % COLUMNS:
            return None
        return pack(codes, scales, row_scales)
    return None


def _forms(module: nn.Linear) -> Iterator[Quants]:
    yield from _of_bitsandbytes(module)
    yield from _of_torchao(module.weight if hasattr(module, "weight") else None)
    yield from _of_compressed_tensors(module)


def _of_bitsandbytes(module: nn.Linear) -> Iterator[Quants]:
    """Eight bits: w = CB SCB / 127, a scale a row; in the weight until a call moves them."""
    for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
        codes, scale = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if codes is not None and scale is not None and codes.dtype == torch.int8:
            yield codes, None, scale.float() / 127
            return


def _of_torchao(weight: object) -> Iterator[Quants]:
    """Eight bits: w = qdata scale, of rows; in an Int8Tensor whose activations stay as they are."""
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if codes is None or scale is None or codes.dtype != torch.int8 or scale.dim() != 2:
        return
    zero, act = getattr(weight, "zero_point", None), getattr(weight, "act_pre_scale", None)
    if scale.shape == (len(codes), 1) and act is None and (zero is None or not zero.any()):
        yield codes, None, scale[:, 0].float()


def _of_compressed_tensors(module: nn.Linear) -> Iterator[Quants]:
    """Four or eight bits, w = (code - 8 or 128) weight_scale, or int8 and e4m3 as they are."""
    held = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    scale, zero = held.get("weight_scale"), held.get("weight_zero_point")
    if scale is None or "weight_g_idx" in held or "weight_global_scale" in held:
        return
    if zero is not None and bool(zero.view(torch.uint8).any()):
        return
    codes = held.get("weight_packed", held.get("weight"))
    assert codes is not None  # a linear layer has one
    codes, scale = codes.data, scale.data
    if codes.dtype == torch.int32:
        words, columns = codes.shape[1], module.in_features
        if words * 4 == columns:  # four codes a word
            codes = codes.contiguous().view(torch.int8) ^ -128
        elif words * 8 != columns:
            return
    elif codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        return  # not quantised, or not packed yet
    scales = _scales(scale, codes.shape[0], module.in_features)
    if scales is not None:
        yield codes, *scales


def _scales(scale: Tensor, rows: int, columns: int) -> tuple[Tensor | None, Tensor | None] | None:
    """Of groups of 32 columns, or of rows; None where they are of neither."""
    if scale.numel() in (1, rows):
        return None, scale.float().flatten().expand(rows).contiguous()
    if scale.ndim != 2 or scale.shape[0] != rows:
        return None
    half = scale if scale.dtype in HALF_SCALES else scale.to(torch.bfloat16)
    return group_scales(half, columns) if torch.equal(half.to(scale.dtype), scale) else None
