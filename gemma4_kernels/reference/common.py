"""What twins and checks of several families share."""

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def finite(x: Tensor) -> Tensor:
    """fp16 as it is, but no further than its largest number, which activations of checkpoints made
    in bf16 pass; NaN stays."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most) if x.dtype == torch.float16 else x


def extremes(x: Tensor) -> tuple[int, int]:
    """The least and the largest of some integers, -1 if there are none."""
    if not x.numel():
        return -1, -1
    least, largest = x.aminmax()
    return int(least), int(largest)


def check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_integral(name: str, x: Tensor) -> None:
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {x.dtype}")


def check_shape(name: str, x: Tensor, want: tuple[int, ...]) -> None:
    if x.shape != want:
        raise ValueError(f"{name} must have shape {list(want)}, got {list(x.shape)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_beside(
    name: str, x: Tensor, other_name: str, other: Tensor, want: tuple[int, ...]
) -> None:
    """Of any floating dtype, on the device of the other, of this shape."""
    check_floating(name, x)
    check_same_device(name, x, other_name, other)
    check_shape(name, x, want)
