"""The packed form of a weight: what goes in comes out, in the order that the kernels read."""

import pytest
import torch
from support.packed import BF16, FORMS, draw, formula

from gemma4_kernels import packed
from gemma4_kernels.packed import PackedWeight, pack, untiled


@pytest.mark.parametrize(("codes_dtype", "scales_dtype"), FORMS)
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (3, 32, 128)])
def test_comes_out(codes_dtype, scales_dtype, shape) -> None:
    codes, scales, row_scales = draw(codes_dtype, scales_dtype, *shape)
    weight = pack(codes, scales, row_scales)
    assert weight.shape == shape
    torch.testing.assert_close(
        weight.dense().double(), formula(codes, scales, row_scales), rtol=3e-7, atol=0
    )
    back, back_scales = untiled(weight)
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))
    if scales is not None:
        assert torch.equal(back_scales.view(torch.uint8), scales.view(torch.uint8))
    if len(shape) == 2:
        some = torch.tensor([shape[0] - 1, 3, 8, 3, 0])
        wanted = formula(codes, scales, row_scales)[some]
        torch.testing.assert_close(weight.at(some).double(), wanted, rtol=3e-7, atol=0)


def test_words_of_eight_codes() -> None:
    codes, scales, _ = draw(torch.uint8, BF16, 32, 128)
    words = sum(codes[:, j::8].long() << 4 * j for j in range(8))
    made = pack(words.to(torch.uint32).view(torch.int32), scales)
    assert torch.equal(made.codes, pack(codes, scales).codes)


def test_a_lane_has_its_rows_and_columns() -> None:
    """The place of each code, spelled out as a kernel computes it."""
    codes, scales, _ = draw(torch.uint8, BF16, 32, 128)
    weight = pack(codes, scales)
    wide, scale, _ = draw(torch.int8, torch.float32, 32, 128)
    bytes_ = pack(wide, scale)
    for row in range(32):
        for column in range(128):
            r, hi, half, q, j = (
                row % 8,
                row // 8 % 2,
                column // 32 % 2,
                column % 32 // 8,
                column % 8,
            )
            lane = r * 4 + q
            tile = weight.codes[row // 16, column // 64]
            word = int.from_bytes(
                bytes(tile[lane * 16 + (half * 2 + hi) * 4 :][:4].tolist()), "little"
            )
            # Column 2 i of the eight is in the low half of (word >> 4 i), 2 i + 1 in the high one.
            assert word >> (4 * (j // 2) + 16 * (j % 2)) & 15 == codes[row, column]
            at = half * 512 + lane * 16 + hi * 8 + j
            assert bytes_.codes[row // 16, column // 64, at] == wide[row, column]
            assert (
                weight.scales[row // 16, column // 64, r * 4 + hi * 2 + half]
                == (scales[row, column // 32])
            )


def test_refusals() -> None:
    codes, scales, row_scales = draw(torch.uint8, BF16, 16, 64)
    with pytest.raises(ValueError, match=r"multiples of 64, got \[16, 32\]"):
        pack(codes[:, :32])
    with pytest.raises(ValueError, match=r"weight_scales must have shape \[1, 1, 32\]"):
        pack(codes, scales[:, :1].repeat(1, 4))
    with pytest.raises(TypeError, match=r"weight_scales must be .* got torch.float32"):
        pack(codes, scales.float())
    with pytest.raises(ValueError, match="weight_row_scales must have shape"):
        pack(codes, scales, row_scales[:8])
    with pytest.raises(TypeError, match="codes in uint8, int8 or float8_e4m3fn"):
        packed.check("weight", codes.float(), None, None)
    assert isinstance(pack(codes, scales), PackedWeight)
