// A weight of four or eight bits a number, in the order in which kernels read it.
//
// w[n, d] = number(code[n, d]) scale row_scale[n]. gemma4_kernels/packed.py makes it and says what
// its dtypes mean. It lies in tiles of 16 rows and 64 columns, [rows / 16, width / 64] of them,
// whose rows are those of the matrix operand of mma.m16n8k16: with r = lane / 4 a lane owns rows r
// and r + 8 and, of each half of 32 columns, the 8 that begin with lane % 4 * 8. All that a lane
// has of a tile is read in 16 bytes.
//
//   bits  a tile's codes                                    a lane's
//   4     512 bytes, [lane, half, r or r + 8, 4 bytes]      16 bytes in one piece
//   8     1024 bytes, [half, lane, r or r + 8, 8 bytes]     16 bytes of each half
//
// Four bits stand in columns 0 2 4 6 1 3 5 7 from the lowest up, so that a shift and a mask give
// two neighbours in the halves of a word.
#pragma once

namespace gemma4 {

constexpr int kPackedRows = 16, kPackedColumns = 64;  // of a tile

enum class Numbers { kInt4, kE2m1, kInt8, kE4m3 };  // kInt4: code - 8

// What shares a scale: 32 columns of a row, 16 of them (kE4m3), or a tile in one float (kTile).
// Those of a tile stand side by side, [r, r or r + 8, columns].
enum class Scales { kNone, kBFloat16, kFloat16, kE4m3, kE8m0, kTile };

struct PackedWeight {
  const void* codes;  // null of a dense weight
  const void* scales;
  const float* row_scales;  // [rows] or null
  Numbers numbers;
  Scales kind;
};

constexpr int bits_of(Numbers numbers) {
  return numbers == Numbers::kInt4 || numbers == Numbers::kE2m1 ? 4 : 8;
}

}  // namespace gemma4
