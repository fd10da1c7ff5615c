// Matrix products of one warp on operands in shared memory: C [16, 8 kN] += A B, with the four
// arithmetics of the hidden layers.
//
// fp16 and bf16: mma.sync m16n8k16 on fragments by ldmatrix; tf32: m16n8k8 on words; fp32: plain
// fused multiply-adds in C's own layout. Accumulation is float32 always.
#pragma once

#include "device.h"

namespace fastmeta {

enum class Mode : int { kFp32, kTf32, kFp16, kBf16 };

FM_HOST_DEVICE constexpr bool is_short(Mode mode) {
  return mode == Mode::kFp16 || mode == Mode::kBf16;
}

template <Mode kMode>
struct OperandOf {
  using type = float;
};
template <>
struct OperandOf<Mode::kFp16> {
  using type = uint16_t;
};
template <>
struct OperandOf<Mode::kBf16> {
  using type = uint16_t;
};
template <Mode kMode>
using Operand = typename OperandOf<kMode>::type;

// Where element (row, column) of a matrix of operands lies. 16-bit rows are dense, their pieces of 16
// bytes in an order that differs from row to row, so that 8 rows of one column of pieces, which
// ldmatrix reads, meet no bank twice; words (g, t) meet none where a row is 4 banks past a multiple
// of 32.
template <Mode kMode, int kWidth>
constexpr int kRow = is_short(kMode) ? kWidth : kWidth + 4;
template <Mode kMode, int kWidth>
FM_DEVICE int place(int row, int column) {
  if constexpr (!is_short(kMode)) return row * kRow<kMode, kWidth> + column;
  constexpr int kPieces = kWidth / 8, kShift = kPieces == 8 ? 0 : kPieces == 4 ? 1 : 2;
  return row * kWidth + (column ^ (row >> kShift & (kPieces - 1)) * 8);
}

// Two neighbours of a row, rounded.
template <Mode kMode>
FM_DEVICE void store_pair(Operand<kMode>* to, float low, float high) {
  if constexpr (kMode == Mode::kFp16) {
    *reinterpret_cast<uint32_t*>(to) = pack_half(low, high);
  } else if constexpr (kMode == Mode::kBf16) {
    *reinterpret_cast<uint32_t*>(to) = pack_bfloat(low, high);
  } else if constexpr (kMode == Mode::kTf32) {
    to[0] = float_of(to_tf32(low));
    to[1] = float_of(to_tf32(high));
  } else {
    to[0] = low;
    to[1] = high;
  }
}

// One number, rounded.
template <Mode kMode>
FM_DEVICE void store_one(Operand<kMode>* to, float x) {
  if constexpr (kMode == Mode::kFp16) {
    *to = static_cast<uint16_t>(pack_half(x, 0.0f));
  } else if constexpr (kMode == Mode::kBf16) {
    *to = static_cast<uint16_t>(pack_bfloat(x, 0.0f));
  } else {
    *to = kMode == Mode::kTf32 ? float_of(to_tf32(x)) : x;
  }
}

// An operand in shared memory. Element (i, j) of the product's A (row, k) or B (k, column) is its
// (i, j) or, flipped, (j, i).
template <Mode kMode, int kWidth>
struct Matrix {
  const Operand<kMode>* at;
  FM_DEVICE const Operand<kMode>* corner(int row, int column) const {
    return at + place<kMode, kWidth>(row, column);
  }
};

template <Mode kMode>
FM_DEVICE void multiply_short(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMode == Mode::kFp16) {
    mma_half(c, a, b);
  } else {
    mma_bfloat(c, a, b);
  }
}

// sums, where asked for: += A · 1, the sums of A's rows, in the columns of one more fragment.
template <Mode kMode, int kN, bool kFlipA, bool kFlipB, int kWidth>
FM_DEVICE void multiply(float (&c)[kN][4], Matrix<kMode, kWidth> a, int row,
                        Matrix<kMode, kWidth> b, int column, int depth, bool with_sums,
                        float (&sums)[4]) {
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  if constexpr (is_short(kMode)) {
    static_assert(kN % 2 == 0, "B comes by pairs of tiles");
    const int low = lane % 8 + (lane / 8 % 2) * 8, high = lane % 8 + (lane / 16) * 8;
    const int left = (lane / 16) * 8, right = (lane / 8 % 2) * 8;
    FM_UNROLL for (int k = 0; k < depth; k += 16) {
      uint32_t fa[4];
      load_matrices(fa, kFlipA ? a.corner(k + high, row + right) : a.corner(row + low, k + left),
                    kFlipA);
      FM_UNROLL for (int j = 0; j < kN; j += 2) {
        uint32_t fb[4];
        const int n = column + 8 * j;
        load_matrices(fb, kFlipB ? b.corner(n + high, k + right) : b.corner(k + low, n + left),
                      !kFlipB);
        multiply_short<kMode>(c[j], fa, {fb[0], fb[1]});
        multiply_short<kMode>(c[j + 1], fa, {fb[2], fb[3]});
      }
      if (with_sums) {
        const uint32_t one = kMode == Mode::kFp16 ? 0x3c003c00u : 0x3f803f80u;
        multiply_short<kMode>(sums, fa, {one, one});
      }
    }
  } else if constexpr (kMode == Mode::kTf32) {
    const auto element = [](Matrix<kMode, kWidth> m, bool flip, int i, int j) {
      return bits_of(*(flip ? m.corner(j, i) : m.corner(i, j)));
    };
    FM_UNROLL for (int k = 0; k < depth; k += 8) {
      uint32_t fa[4];
      FM_UNROLL for (int i = 0; i < 4; ++i) {
        fa[i] = element(a, kFlipA, row + g + i % 2 * 8, k + t + i / 2 * 4);
      }
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        uint32_t fb[2];
        FM_UNROLL for (int i = 0; i < 2; ++i) {
          fb[i] = element(b, kFlipB, k + t + 4 * i, column + 8 * j + g);
        }
        mma_tf32(c[j], fa, fb);
      }
      if (with_sums) mma_tf32(sums, fa, {0x3f800000u, 0x3f800000u});
    }
  } else {
    const auto element = [](Matrix<kMode, kWidth> m, bool flip, int i, int j) {
      return *(flip ? m.corner(j, i) : m.corner(i, j));
    };
    FM_UNROLL_8 for (int k = 0; k < depth; ++k) {
      const float a0 = element(a, kFlipA, row + g, k), a1 = element(a, kFlipA, row + g + 8, k);
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        const int n = column + 8 * j + 2 * t;
        const float b0 = element(b, kFlipB, k, n), b1 = element(b, kFlipB, k, n + 1);
        c[j][0] = fused(a0, b0, c[j][0]);
        c[j][1] = fused(a0, b1, c[j][1]);
        c[j][2] = fused(a1, b0, c[j][2]);
        c[j][3] = fused(a1, b1, c[j][3]);
      }
      if (with_sums) {
        sums[0] += a0;
        sums[2] += a1;
      }
    }
  }
}

template <Mode kMode, int kN, bool kFlipA, bool kFlipB, int kWidth>
FM_DEVICE void multiply(float (&c)[kN][4], Matrix<kMode, kWidth> a, int row,
                        Matrix<kMode, kWidth> b, int column, int depth) {
  float none[4];
  multiply<kMode, kN, kFlipA, kFlipB>(c, a, row, b, column, depth, false, none);
}

}  // namespace fastmeta
