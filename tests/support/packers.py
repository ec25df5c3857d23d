"""Quantised weights as their libraries store them, and the numbers they stand for in float64.

Each packer draws a weight [rows, columns] and returns its tensors by the ends of their names, and
w: codes and scales are drawn, so that nothing is rounded on the way.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rng = np.random.Generator
Parts = dict[str, Tensor]
Made = tuple[Parts, np.ndarray]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Codes [..., n] in int32 words along the last dimension, the lowest bits first."""
    each = 32 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each) * each), np.int64)
    padded[..., : codes.shape[-1]] = codes
    made = np.zeros((*codes.shape[:-1], padded.shape[-1] // each), np.int64)
    for j in range(each):
        made |= padded[..., j::each] << bits * j
    return torch.from_numpy(made.astype(np.uint32).view(np.int32).copy())


def halves(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    first, second = codes[..., ::2], codes[..., 1::2]
    low, high = (second, first) if high_first else (first, second)
    return (low | high << 4).astype(np.uint8)


def scales(rng: Rng, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, np.ndarray]:
    tensor = torch.from_numpy(rng.uniform(0.005, 0.05, shape)).to(dtype)
    return tensor, tensor.double().numpy()


def repeated(scale: np.ndarray, columns: int, size: int) -> np.ndarray:
    return scale[:, np.arange(columns) // size]


def w4a16(
    group: int | None, bits: int = 4, zeros: bool = False, order: bool = False
) -> Callable[[Rng, int, int], Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        size = group or columns
        codes = rng.integers(0, 2**bits, (rows, columns))
        scale, s = scales(rng, rows, -(-columns // size))
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        of = np.arange(columns) // size
        zero = np.full(s.shape, 2 ** (bits - 1))
        if zeros:
            zero = rng.integers(0, 2**bits, s.shape)
            parts["weight_zero_point"] = words(zero.T, bits).T.contiguous()
        if order:
            of = rng.permutation(of)
            parts["weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
        return parts, (codes - zero[:, of]) * s[:, of]

    return pack


def scaled(
    dtype: torch.dtype, kind: str, name: str = "weight", scale_name: str = "weight_scale"
) -> Callable[[Rng, int, int], Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        if dtype == torch.int8:
            q = torch.from_numpy(rng.integers(-127, 128, (rows, columns)).astype(np.int8))
        else:
            q = torch.from_numpy(rng.normal(size=(rows, columns)) * 8).float().to(dtype)
        shape = {
            "scalar": (),
            "tensor": (1,),
            "row": (rows, 1),
            "flat": (rows,),
            "block": (-(-rows // 32), -(-columns // 16)),
        }[kind]
        scale, s = scales(rng, *shape, dtype=torch.float32)
        full = np.broadcast_to(s.reshape(-1, 1), (rows, columns)) if kind != "block" else None
        if full is None:
            full = s[np.arange(rows)[:, None] // 32, np.arange(columns)[None] // 16]
        if scale_name == "SCB":
            full = full / 127
        return {name: q, scale_name: scale}, q.double().numpy() * full

    return pack


def fp4(kind: str) -> Callable[[Rng, int, int], Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        codes, size = rng.integers(0, 16, (rows, columns)), 32 if kind == "mx" else 16
        data = torch.from_numpy(halves(codes))
        groups = -(-columns // size)
        if kind == "mx":
            exponents = rng.integers(118, 124, (rows, groups)).astype(np.uint8)
            s = 2.0 ** (exponents.astype(np.float64) - 127)
            parts = {"weight_packed": data, "weight_scale": torch.from_numpy(exponents)}
        else:
            scale = torch.from_numpy(rng.uniform(1, 100, (rows, groups))).float()
            scale = scale.to(torch.float8_e4m3fn)
            s = scale.double().numpy()
            if kind == "ct":
                parts = {
                    "weight_packed": data,
                    "weight_scale": scale,
                    "weight_global_scale": torch.tensor([4096.0]),
                    "input_global_scale": torch.tensor([3.0]),
                }
                s = s / 4096
            else:
                parts = {
                    "weight": data,
                    "weight_scale": scale,
                    "weight_scale_2": torch.tensor(2.0**-12),
                    "input_scale": torch.tensor(3.0),
                }
                s = s * 2.0**-12
        return parts, E2M1[codes] * repeated(s, columns, size)

    return pack


def mobile(bits: int) -> Callable[[Rng, int, int], Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 2**bits, (rows, columns))
        each = 8 // bits
        data = sum(codes[:, j::each] << bits * j for j in range(each)).astype(np.uint8)
        scale, s = scales(rng, rows, 1, dtype=torch.float32)
        parts = {
            "weight": torch.from_numpy(data),
            "weight_scale": scale,
            "input_activation_scale": torch.tensor(0.1),
            "output_activation_scale": torch.tensor(0.1),
        }
        return parts, (codes - 2 ** (bits - 1)) * s

    return pack


def gptq(bits: int = 4, order: bool = False, stored_less: int = 1) -> Callable[..., Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 2**bits, (columns, rows))
        group = np.arange(columns) // 32
        if order:
            group = rng.permutation(group)
        groups = int(group.max()) + 1
        zero = rng.integers(1, 2**bits, (groups, rows))
        scale, s = scales(rng, groups, rows, dtype=torch.float16)
        parts = {
            "qweight": words(codes.T, bits).T.contiguous(),
            "qzeros": words(zero - stored_less, bits),
            "scales": scale,
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return parts, ((codes - zero[group]) * s[group]).T

    return pack


def awq(rng: Rng, rows: int, columns: int) -> Made:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def turned(codes: np.ndarray) -> Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., order].reshape(codes.shape), 4)

    codes = rng.integers(0, 16, (columns, rows))
    zero = rng.integers(0, 16, (columns // 32, rows))
    scale, s = scales(rng, columns // 32, rows, dtype=torch.float16)
    of = np.arange(columns) // 32
    parts = {"qweight": turned(codes), "qzeros": turned(zero), "scales": scale}
    return parts, ((codes - zero[of]) * s[of]).T


def nf4(double: bool) -> Callable[[Rng, int, int], Made]:
    def pack(rng: Rng, rows: int, columns: int) -> Made:
        count = rows * columns
        codes, table = rng.integers(0, 16, count), np.sort(rng.normal(size=16)).astype(np.float32)
        blocks = -(-count // 64)
        state: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": 64,
            "shape": [rows, columns],
        }
        if double:
            inner, outer = np.sort(rng.uniform(0.1, 1, 256)).astype(np.float32), -(-blocks // 8)
            nested = rng.uniform(0.5, 2, outer).astype(np.float32)
            bytes_ = rng.integers(0, 256, blocks)
            absmax = inner[bytes_].astype(np.float64) * nested[np.arange(blocks) // 8] + 0.25
            state |= {"nested_blocksize": 8, "nested_offset": 0.25}
            parts = {
                "weight.absmax": torch.from_numpy(bytes_.astype(np.uint8)),
                "weight.nested_absmax": torch.from_numpy(nested),
                "weight.nested_quant_map": torch.from_numpy(inner),
            }
        else:
            parts = {"weight.absmax": torch.rand(blocks)}
            absmax = parts["weight.absmax"].double().numpy()
        text = json.dumps(state).encode()
        parts |= {
            "weight": torch.from_numpy(halves(codes, high_first=True))[:, None],
            "weight.quant_map": torch.from_numpy(table),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
        }
        dense = table[codes].astype(np.float64) * absmax[np.arange(count) // 64]
        return parts, dense.reshape(rows, columns)

    return pack


COMPRESSED = {"quant_method": "compressed-tensors"}
GROUPS = {"config_groups": {"group_0": {"weights": {"group_size": 64}}}}
BLOCKS = {"config_groups": {"group_0": {"weights": {"block_structure": [32, 16]}}}}
# The quantization_config and the packer of each format.
FORMATS: dict[str, tuple[dict, Callable[[Rng, int, int], Made]]] = {
    "w4a16 in groups": (COMPRESSED, w4a16(32)),
    "w4a16 in short last groups": (COMPRESSED | GROUPS, w4a16(64)),
    "w4a16 in rows": (COMPRESSED, w4a16(None)),
    "w4a16 with zero points": (COMPRESSED, w4a16(32, zeros=True)),
    "w4a16 out of order": (COMPRESSED, w4a16(32, zeros=True, order=True)),
    "w8a16": (COMPRESSED, w4a16(None, 8)),
    "w8a16 with zero points": (COMPRESSED, w4a16(32, 8, zeros=True)),
    "int8": (COMPRESSED, scaled(torch.int8, "row")),
    "fp8 in rows": (COMPRESSED, scaled(torch.float8_e4m3fn, "row")),
    "fp8 in flat rows": (COMPRESSED, scaled(torch.float8_e4m3fn, "flat")),
    "fp8 static": (COMPRESSED, scaled(torch.float8_e4m3fn, "tensor")),
    "fp8 in blocks": (COMPRESSED | BLOCKS, scaled(torch.float8_e4m3fn, "block")),
    "fp8, inverse": (
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
        scaled(torch.float8_e4m3fn, "block", scale_name="weight_scale_inv"),
    ),
    "nvfp4": (COMPRESSED, fp4("ct")),
    "mxfp4": (COMPRESSED, fp4("mx")),
    "nvfp4 of modelopt": ({"quant_method": "modelopt"}, fp4("modelopt")),
    "gptq": ({"quant_method": "gptq"}, gptq()),
    "gptq in 8 bits": ({"quant_method": "gptq"}, gptq(8)),
    "gptq out of order": ({"quant_method": "gptq"}, gptq(order=True)),
    "gptq_v2": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        gptq(order=True, stored_less=0),
    ),
    "awq": ({"quant_method": "awq", "version": "gemm"}, awq),
    "nf4": ({"quant_method": "bitsandbytes"}, nf4(False)),
    "nf4, double": ({"quant_method": "bitsandbytes"}, nf4(True)),
    "int8 of bitsandbytes": (
        {"quant_method": "bitsandbytes"},
        scaled(torch.int8, "flat", scale_name="SCB"),
    ),
    "int8 of torchao": (
        {"quant_method": "torchao"},
        scaled(torch.int8, "row", "_weight_qdata", "_weight_scale"),
    ),
    "fp8 of torchao": (
        {"quant_method": "torchao"},
        scaled(torch.float8_e4m3fn, "row", "_weight_qdata", "_weight_scale"),
    ),
    "mobile, 4 bits": ({"quant_method": "gemma"}, mobile(4)),
    "mobile, 2 bits": ({"quant_method": "gemma"}, mobile(2)),
    "mobile, 8 bits": ({"quant_method": "gemma"}, scaled(torch.int8, "row")),
}
