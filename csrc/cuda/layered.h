// One layer of many tasks at a time, for networks of any size: a tile of a product of matrices in
// device memory, forward, back, and of the weights' gradient, plain and dual.
//
//   forward   z = h_{l-1} W_lᵀ + b_l, h_l = φ(z), φ'(z)        C [points, out]
//   back      δ_{l-1} = φ'(z_{l-1}) ⊙ δ_l W_l                    C [points, in]
//   gradient  W̄_l = δ_lᵀ h_{l-1}, b̄_l = δ_lᵀ 1                  C [out, in], a sum over points
//
// On dual numbers the same lines; the gradient keeps the tangent alone. A block of 4 warps owns 64 x
// 64 of C (narrow: 64 x 8), a warp 16 rows of it, and goes through what is summed over in pieces of
// 64: both operands are read from float32 rows, brought to the mode's format on the way to shared
// memory, and multiplied there (product.h). Rows that the host lays out are on 16 bytes, and weights
// are copied to such rows once a pass: four numbers a load. What lies beyond the rows and columns
// that exist is 0, so that no size needs to be a multiple of anything. C goes through shared memory
// once more: its rows are then read and written whole, and each activation is compiled once.
//
// Activations, slopes and δ are float32 in device memory; δ takes the slope's place. Kept from
// forward to back: h and φ' of every layer; nothing is recomputed but encodings. The points of a
// gradient are cut into parts, one a block, summed in order by a second kernel (sums.h): no atomics,
// the same bits every run.
//
// Floors on an H200, a point and feature of a layer at width H: 32 bytes of device memory, 12
// forward and 20 back, 7.4 ps at 4.3 TB/s (dual: 64); 6 H FLOP (dual: 18), 5.7 ps in fp32 at width
// 64, 23 at 256; 1.9 ps in 16 bit at 256. A tile of 64 x 64 takes 32 KiB from L2 for 0.5 MFLOP:
// about 100 TFLOP/s at 6 TB/s, which bounds the 16-bit modes from width 128 on. Counted, not timed.
//
// fp16: operands are multiplied by powers of two on the way to shared memory, and what comes out is
// divided by them, exactly: δ by the one that brings the largest of the task's |δ_L| to [½, 1), δ̇
// by that of |δ̇_L| where it is smaller, as behind rays whose adjoints reach 1e20; tangents of the
// other operand by the quotient of the two, at most, as in the forward pass, that of the largest of
// |v| and |w|.
//
// Edges are fp32 whatever the mode: coordinates, the first layer of a sine network, the last layer.
// Narrow tiles are for those of few columns, the outputs and the coordinates; their gradients take
// the bias's as one more column of ones.
//
//             KiB of shared memory (dual)   registers (dual): forward, back, gradient
//   16 bit    18 (36)                       128 (168), 127 (162), 127 (132)
//   tf32      34 (68)                       116 (151), 96 (143), 96 (114)
//   fp32      34 (68)                       128 (168), 96 (139), 96 (113)
//   narrow    34 (68)                       89 (104), 86 (96), 92 (92)
//
// Registers as ptxas 13.0 reports them on sm_90; nothing spills. Dropped: the products of words
// unrolled over a whole piece (tf32, dual, back: 700 bytes spilled); two numbers a load (twice the
// instructions of four).
#pragma once

#include "number.h"

namespace fastmeta {

constexpr int kSide = 64, kNarrow = 8, kTileThreads = 128;

enum class Way : int { kForward, kBack, kGradient };

// Rows of floats in device memory, a set for each task: values, and tangents where there are any.
struct Rows {
  const float* at[2];
  int64_t task[2];  // from one task's to the next one's
  int64_t row;      // from row to row
  int rows, columns;
};

// Absolute values of which the largest is wanted: count of them for each task.
struct Peaks {
  const float* at;
  int count;
};

struct Product {
  Rows a, b;
  int rows, columns, row_tiles, column_tiles;  // of C
  int depth, part;                             // summed over; by one block
  // h, δ or gradients; slopes: of h, beside it (forward), or where δ goes (back)
  float* to[2];
  int64_t to_task[2], to_row, to_part;
  float* slopes[2];
  int64_t slopes_task;
  // forward
  const float* bias[2];
  int64_t bias_task[2];
  Activation activation;
  Output output;
  float w0, shift;
  // gradient: where the layer's begins; in narrow tiles, which column is 1, and of which operand
  int64_t weight_at, bias_at;
  int ones;
  bool flipped;                   // C is [in, out]: A is h, B is δ
  Peaks ends, ends_along, along;  // of fp16's powers of two: |δ_L|, its tangent; |v| and |w|
};

// Products of one mode; narrow ones are fp32's alone. Returns the CUDA error.
struct Layered {
  int mode;
  int (*product)(Way way, bool dual, bool narrow, const Product& p, int64_t tasks, int64_t parts,
                 void* stream);
};

// The largest of a task's peaks; all lanes of a warp call it.
FM_DEVICE float largest_of(const Peaks& peaks, int64_t task) {
  float largest = 0;
  for (int i = thread_index() % 32; i < peaks.count; i += 32) {
    const float x = peaks.at[task * peaks.count + i];
    largest = x > largest ? x : largest;
  }
  return warp_max(largest);
}

template <Mode kMode, bool kDual_, Way kWay, bool kThin>
struct Tile {
  static constexpr bool kDual = kDual_;
  static constexpr int kPlanes = kDual ? 2 : 1, kColumns = kThin ? kNarrow : kSide,
                       kN = kColumns / 8, kLeft = kWay == Way::kGradient ? 1 : kPlanes;
  static constexpr bool kFlipA = kWay == Way::kGradient, kFlipB = kWay == Way::kForward;
  static constexpr bool kOnes = kThin && kWay == Way::kGradient;
  static constexpr int kSize = kSide * kRow<kMode, kSide>;  // operands of a matrix
  static constexpr int kRowC = kColumns + 8;                // of C, in floats: no bank twice
  static constexpr int kOperandBytes = 2 * kPlanes * kSize * int(sizeof(Operand<kMode>)),
                       kBytesC = kLeft * kSide * kRowC * 4,
                       kBytes = kOperandBytes > kBytesC ? kOperandBytes : kBytesC;
  using Number = NumberOf<kDual>;
  using Op = Operand<kMode>;
  // What the epilogue meets: numbers; of a gradient, its kept part.
  using Entry = NumberOf<kDual && kWay != Way::kGradient>;

  const Product& p;
  int tid, warp, g, t, row0, column0, part;
  int64_t task;
  float up = 1, along = 1;  // powers of two on the adjoints and on tangents
  float c[kLeft][kN][4], sums[4];

  FM_DEVICE explicit Tile(const Product& product)
      : p(product), tid(thread_index()), part(block_y()) {
    warp = tid / 32;
    g = tid % 32 / 4;
    t = tid % 4;
    const int tiles = p.row_tiles * p.column_tiles, tile = block_x() % tiles;
    task = block_x() / tiles;
    row0 = tile / p.column_tiles * kSide;
    column0 = tile % p.column_tiles * kColumns;
    if constexpr (kMode == Mode::kFp16) {
      if (kDual) along = power_of(largest_of(p.along, task));
      if constexpr (kWay != Way::kForward) {
        up = power_of(largest_of(p.ends, task));
        const float tangent = kDual ? largest_of(p.ends_along, task) : 0.0f;
        if (tangent > 0) {  // up times along is to suit it too
          const float ratio = power_of(tangent) / up;
          along = ratio < along ? (ratio > 0x1p-100f ? ratio : 0x1p-100f) : along;
        }
      }
    }
    FM_UNROLL for (int i = 0; i < kLeft; ++i) {
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
      }
    }
    FM_UNROLL for (int e = 0; e < 4; ++e) sums[e] = 0;
  }

  FM_DEVICE Op* operand(int which, int plane) const {
    return reinterpret_cast<Op*>(shared_memory()) + (2 * plane + which) * kSize;
  }

  // Rows and columns from a place on to shared memory; column `ones` is 1 in rows that exist. Four
  // numbers a load where all are on 16 bytes, else one: neighbours of a row to neighbouring lanes.
  template <int kTall, int kWide>
  FM_DEVICE void stage(Op* to, const float* from, int64_t ld, int row, int column, int rows,
                       int columns, int ones, float scale) const {
    const auto unaligned = reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(4 * ld);
    if (unaligned % 16 == 0) {  // then a row's last four lie in the row
      stage_by<kTall, kWide, 4>(to, from, ld, row, column, rows, columns, ones, scale);
    } else {
      stage_by<kTall, kWide, 1>(to, from, ld, row, column, rows, columns, ones, scale);
    }
  }
  template <int kTall, int kWide, int kFew>
  FM_DEVICE void stage_by(Op* to, const float* from, int64_t ld, int row, int column, int rows,
                          int columns, int ones, float scale) const {
    struct alignas(4 * kFew) Few {
      float x[kFew];
    };
    constexpr int kLanes = kWide / kFew, kStep = kTileThreads / kLanes, kTimes = kTall / kStep,
                  kBatch = kTimes < 8 ? kTimes : 8;  // loads under way at a time
    const int r = tid / kLanes, x = tid % kLanes * kFew;
    const bool inside = column + x < columns;
    const float* at = from + (row + r) * ld + column + x;
    FM_UNROLL_1 for (int n = 0; n < kTimes; n += kBatch) {
      Few few[kBatch];
      FM_UNROLL for (int j = 0; j < kBatch; ++j) {
        const bool there = row + r + (n + j) * kStep < rows;
        few[j] = {};
        if (there && inside) few[j] = *reinterpret_cast<const Few*>(at + (n + j) * kStep * ld);
        FM_UNROLL for (int e = 0; e < kFew; ++e) {
          if (kFew > 1 && column + x + e >= columns) few[j].x[e] = 0;
          if (kOnes && there && column + x + e == ones) few[j].x[e] = 1;
          if (kMode == Mode::kFp16) few[j].x[e] *= scale;
        }
      }
      FM_UNROLL for (int j = 0; j < kBatch; ++j) {
        Op* into = to + place<kMode, kSide>(r + (n + j) * kStep, x);
        if constexpr (kFew == 1) {
          store_one<kMode>(into, few[j].x[0]);
        } else {
          store_pair<kMode>(into, few[j].x[0], few[j].x[1]);
          store_pair<kMode>(into + 2, few[j].x[2], few[j].x[3]);
        }
      }
    }
  }
  FM_DEVICE void stage_a(int k, int last) const {
    FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      if (!p.a.at[plane]) continue;
      const float* from = p.a.at[plane] + task * p.a.task[plane];
      const float scale = (kWay == Way::kForward ? 1.0f : up) * (plane ? along : 1.0f);
      const int ones = kOnes && p.flipped && !plane ? p.ones : -1;
      if (kFlipA) {
        stage<kSide, kSide>(operand(0, plane), from, p.a.row, k, row0, last, p.a.columns, ones,
                            scale);
      } else {
        stage<kSide, kSide>(operand(0, plane), from, p.a.row, row0, k, p.a.rows, p.a.columns, ones,
                            scale);
      }
    }
  }
  FM_DEVICE void stage_b(int k, int last) const {
    FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      if (!p.b.at[plane]) continue;
      const float* from = p.b.at[plane] + task * p.b.task[plane];
      const float scale = plane ? along : 1.0f;
      const int ones = kOnes && !p.flipped && !plane ? p.ones : -1;
      if (kFlipB) {
        stage<kColumns, kSide>(operand(1, plane), from, p.b.row, column0, k, p.b.rows, p.b.columns,
                               ones, scale);
      } else {
        stage<kSide, kColumns>(operand(1, plane), from, p.b.row, k, column0, last, p.b.columns,
                               ones, scale);
      }
    }
  }

  template <bool kSums>
  FM_DEVICE void add(float (&to)[kN][4], int plane_a, int plane_b, int depth) {
    const Matrix<kMode, kSide> a = {operand(0, plane_a)}, b = {operand(1, plane_b)};
    multiply<kMode, kN, kFlipA, kFlipB>(to, a, 16 * warp, b, 0, depth, kSums && column0 == 0, sums);
  }

  FM_DEVICE void run() {
    const int first = part * p.part, last = p.depth - first < p.part ? p.depth : first + p.part;
    constexpr bool kSums = kWay == Way::kGradient && !kThin;
    FM_UNROLL_1 for (int k = first; k < last; k += kSide) {
      FM_MEET();  // the piece before has been read
      stage_a(k, last);
      stage_b(k, last);
      FM_MEET();
      if (row0 + 16 * warp >= p.rows) continue;
      const int left = last - k < kSide ? last - k : kSide;
      // 16 bit: a constant, so that it is unrolled; words: what there is, and no spills
      const int depth = is_short(kMode) ? kSide : left;
      if constexpr (!kDual) {
        add<kSums>(c[0], 0, 0, depth);
      } else {
        if (kLeft == 2) add<false>(c[0], 0, 0, depth);
        if (p.a.at[1]) add<kSums>(c[kLeft - 1], 1, 0, depth);
        if (p.b.at[1]) add<false>(c[kLeft - 1], 0, 1, depth);
      }
    }
    FM_MEET();  // the operands have been read
    float* all = reinterpret_cast<float*>(shared_memory());
    FM_UNROLL for (int i = 0; i < kLeft; ++i) {
      const bool tangent = kDual && i == kLeft - 1;
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) {
          const int row = 16 * warp + g + e / 2 * 8, column = 8 * j + 2 * t + e % 2;
          all[(i * kSide + row) * kRowC + column] = undo(c[i][j][e], tangent);
        }
      }
    }
    FM_MEET();
    if constexpr (kWay == Way::kForward) {
      leave_layer();
    } else if constexpr (kWay == Way::kBack) {
      leave_delta();
    } else {
      leave_gradient();
    }
  }

  FM_DEVICE float undo(float x, bool tangent) const {
    if (kMode != Mode::kFp16) return x;
    if (kWay != Way::kForward) x *= 1.0f / up;
    return tangent ? x * (1.0f / along) : x;
  }

  // f(row, column, entry) for what exists of the tile.
  template <class F>
  FM_DEVICE void each(F&& f) const {
    const float* all = reinterpret_cast<const float*>(shared_memory());
    FM_UNROLL_1 for (int i = tid; i < kSide * kColumns; i += kTileThreads) {
      const int r = i / kColumns, x = i % kColumns;
      if (row0 + r >= p.rows || column0 + x >= p.columns) continue;
      const float* at = all + r * kRowC + x;
      if constexpr (kLeft == 2) {
        f(row0 + r, column0 + x, Entry{at[0], at[kSide * kRowC]});
      } else {
        f(row0 + r, column0 + x, at[0]);
      }
    }
  }
  FM_DEVICE static void put(float* const (&to)[2], const int64_t (&tasks)[2], int64_t task,
                            int64_t i, float x) {
    if (to[0]) to[0][task * tasks[0] + i] = x;
  }
  FM_DEVICE static void put(float* const (&to)[2], const int64_t (&tasks)[2], int64_t task,
                            int64_t i, Dual<float> x) {
    if (to[0]) to[0][task * tasks[0] + i] = x.a;
    if (to[1]) to[1][task * tasks[1] + i] = x.d;
  }

  template <Activation kKind>
  FM_DEVICE void leave_layer_as(float w0, float shift) const {
    const int64_t slopes[2] = {p.slopes_task, p.slopes_task};
    each([&](int m, int o, Entry z) {
      Entry b, h, slope;
      if constexpr (kDual) {
        b = {p.bias[0][task * p.bias_task[0] + o], p.bias[1][task * p.bias_task[1] + o]};
      } else {
        b = p.bias[0][task * p.bias_task[0] + o];
      }
      float phase = 0;
      bend<kMode, true, kKind>(z + b, w0, h, slope, phase);
      put(p.to, p.to_task, task, m * p.to_row + o, h + shift);
      put(p.slopes, slopes, task, m * p.to_row + o, slope);
    });
  }
  FM_DEVICE void leave_layer() const {
    if constexpr (kThin) {
      with_output(p.output,
                  [&](auto tag) { leave_layer_as<decltype(tag)::kValue>(1.0f, p.shift); });
    } else {
      with_activation(p.activation,
                      [&](auto tag) { leave_layer_as<decltype(tag)::kValue>(p.w0, 0.0f); });
    }
  }

  FM_DEVICE void leave_delta() const {
    each([&](int m, int i, Entry x) {
      const int64_t at = m * p.to_row + i;
      if constexpr (kThin) {
        p.to[0][task * p.to_task[0] + at] = kept(x);  // x̄
      } else {
        if (p.slopes[0]) {
          const int64_t from = task * p.slopes_task + at;
          if constexpr (kDual) {
            x = Entry{p.slopes[0][from], p.slopes[1][from]} * x;
          } else {
            x *= p.slopes[0][from];
          }
        }
        put(p.to, p.to_task, task, at, x);
      }
    });
  }

  FM_DEVICE void leave_gradient() const {
    float* to = p.to[0] + task * p.to_task[0] + part * p.to_part;
    each([&](int o, int i, float x) {
      if constexpr (kThin) {
        const int feature = p.flipped ? o : i, out = p.flipped ? i : o;
        const int64_t weight = p.weight_at + static_cast<int64_t>(out) * p.ones + feature;
        to[feature < p.ones ? weight : p.bias_at + out] = x;
      } else {
        to[p.weight_at + static_cast<int64_t>(o) * p.columns + i] = x;
      }
    });
    if constexpr (!kThin) {
      if (column0 || t) return;
      FM_UNROLL for (int half = 0; half < 2; ++half) {
        const int o = row0 + 16 * warp + g + 8 * half;
        if (o < p.rows) to[p.bias_at + o] = undo(sums[2 * half], kDual);
      }
    }
  }
};

template <Mode kMode, bool kDual, Way kWay, bool kThin>
FM_KERNEL void FM_BOUNDS(kTileThreads, kDual ? 3 : 4) layer(FM_CONSTANT Product p) {
  Tile<kMode, kDual, kWay, kThin> tile(p);
  tile.run();
}

}  // namespace fastmeta
