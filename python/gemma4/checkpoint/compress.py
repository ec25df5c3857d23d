"""Packed weights of a model as compressed-tensors stores them: the same codes and scales."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gemma4_kernels.packed import HALF_SCALES, ROWS, PackedWeight, halves, untiled
from gemma4_kernels.packed_linear import PackedParameter

from ..experts import Experts
from ..files import Json

# Blocks of rows and columns that share a float32 scale: what other programs read, and a tile.
_BLOCKS = ((128, 128), (16, 64))
_EXPERTS = {"gate_up_packed": ("gate_proj", "up_proj"), "down_packed": ("down_proj",)}
# A format's name, and what a config says of its weights.
Scheme = tuple[str, tuple[tuple[str, object], ...]]


def packed_weights(model: nn.Module) -> dict[str, PackedParameter]:
    """By their names; a tied head is the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedParameter)
    }


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds in place of its packed weights, piece by piece."""
    block = _block(model)
    for module, weight in _linears(model):
        for role, tensor in _parts(module, weight, block).items():
            yield f"{module}.{role}", tensor


def config(model: nn.Module) -> Json:
    """The quantization_config of such a checkpoint."""
    block = _block(model)
    schemes = {module: _scheme(module, weight, block) for module, weight in _linears(model)}
    counts = Counter(schemes.values())
    groups: Json = {}
    for index, (scheme, _) in enumerate(counts.most_common()):
        # What no other group names is of the first one.
        names = [module for module, other in schemes.items() if other == scheme]
        groups[f"group_{index}"] = {
            "targets": names if index else ["Linear"],
            "weights": {"symmetric": True, "dynamic": False, **dict(scheme[1])},
            "input_activations": None,
            "format": scheme[0],
        }
    formats = {scheme[0] for scheme in counts}
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": dense,
        "config_groups": groups,
        "kv_cache_scheme": None,
    }


def _linears(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Weights [N, D] by the names of their modules, each expert's projections one by one."""
    for name, parameter in packed_weights(model).items():
        module, _, leaf = name.rpartition(".")
        weight = parameter()
        if not isinstance(model.get_submodule(module), Experts):
            yield module, weight
            continue
        rows = _EXPERTS[leaf]
        for e in range(weight.shape[0]):
            for row, part in zip(rows, _split(weight[e], len(rows)), strict=True):
                yield f"{module}.{e}.{row}", part


def _split(weight: PackedWeight, count: int) -> list[PackedWeight]:
    """Into parts of as many rows."""
    parts = ((None,) * count if p is None else p.chunk(count) for p in weight.parts)
    return [
        PackedWeight(codes, scales, row_scales)
        for codes, scales, row_scales in zip(*parts, strict=True)
        if codes is not None
    ]


def _block(model: nn.Module) -> tuple[int, int]:
    """The largest blocks that the float32 scales of all weights are made of."""
    scales = [weight.scales for _, weight in _linears(model)]
    tiles = [s for s in scales if s is not None and s.dtype == torch.float32]
    return next(
        (b for b in _BLOCKS if all(torch.equal(_spread(_thin(s, b), b, s), s) for s in tiles)),
        _BLOCKS[-1],
    )


def _thin(scales: Tensor, block: tuple[int, int]) -> Tensor:
    return scales[:: block[0] // ROWS, :: block[1] // 64]


def _spread(scales: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    wide = scales.repeat_interleave(block[0] // ROWS, 0).repeat_interleave(block[1] // 64, 1)
    return wide[: like.shape[0], : like.shape[1]]


def _scheme(module: str, weight: PackedWeight, block: tuple[int, int]) -> Scheme:
    codes, scales, row_scales = weight.parts
    fp4 = codes.dtype == torch.uint8 and scales is not None and scales.itemsize == 1
    if scales is not None and row_scales is not None and not fp4:
        raise ValueError(f"{module} has scales of groups and of rows, which no format stores")
    if fp4:
        assert scales is not None
        kind = "mxfp4" if scales.dtype == torch.float8_e8m0fnu else "nvfp4"
        strategy = "group" if kind == "mxfp4" else "tensor_group"
        size = 32 if kind == "mxfp4" else 16
        said = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
        return f"{kind}-pack-quantized", tuple(said.items())
    bits = 4 if codes.dtype == torch.uint8 else 8
    kind = "float" if codes.dtype == torch.float8_e4m3fn else "int"
    said = {"num_bits": bits, "type": kind}
    if scales is None:
        said |= {"strategy": "channel"}
    elif scales.dtype in HALF_SCALES:
        said |= {"strategy": "group", "group_size": 32}
    else:
        said |= {"strategy": "block", "block_structure": block}
    if kind == "float":
        name = "float-quantized"
    else:
        name = "int-quantized" if said["strategy"] == "block" else "pack-quantized"
    return name, tuple(said.items())


def _parts(module: str, weight: PackedWeight, block: tuple[int, int]) -> dict[str, Tensor]:
    name, _ = _scheme(module, weight, block)
    rows, columns = weight.shape
    code, scales = untiled(weight)
    if scales is not None and scales.dtype == torch.float32:
        return {"weight": code, "weight_scale": _thin(scales, block).contiguous()}
    if name.startswith("nvfp4"):
        assert scales is not None
        whole = _reciprocal(module, weight.row_scales)
        return {"weight_packed": halves(code), "weight_scale": scales, "weight_global_scale": whole}
    if name.startswith("mxfp4"):
        assert scales is not None
        return {"weight_packed": halves(code), "weight_scale": scales.view(torch.uint8)}
    if scales is None:
        given = weight.row_scales
        scales = torch.ones(rows, 1) if given is None else given[:, None]
    if name == "float-quantized":
        return {"weight": code, "weight_scale": scales}
    if code.dtype == torch.uint8:
        words = halves(code).view(torch.int32)
    else:
        words = (code.view(torch.uint8) ^ 128).view(torch.int32)
    shape = torch.tensor([rows, columns])
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}


def _reciprocal(module: str, row_scales: Tensor | None) -> Tensor:
    """The divisor [1] that gives a scale, which all rows share, back bit by bit."""
    if row_scales is None:
        return torch.ones(1)
    scale = row_scales[:1].cpu()
    near = 1 / scale
    below, above = (torch.nextafter(near, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    found = [trial for trial in (near, below, above) if torch.equal(1 / trial, scale)]
    if not found or bool((row_scales != row_scales[0]).any()):
        raise ValueError(f"{module} has no one divisor for its scales, which nvfp4 stores")
    return found[0]
