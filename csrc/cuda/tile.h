// A tile of points through the network and back, in one block's shared memory.
//
//   z_l = W_l h_{l-1} + b_l, h_l = φ(z_l);  δ_l = φ'(z_l) h̄_l, W̄_l += δ_lᵀ h_{l-1},
//   h̄_{l-1} = δ_l W_l;  on dual numbers the same lines, of which the tangents are kept
//
// Rich kernels also take
//
//   features  h_0 = q in the first columns and sin q in the others, q = x B + φ: chunks of kH
//             columns, each an operand like any h, and W_1 a hidden matrix for each chunk. They are
//             computed once a tile and kept; x̄ = (cos q ⊙ h̄_0) Bᵀ computes q again. B and φ are
//             read from device memory. The arithmetic is the mode's, so sines on features are
//             float32's alone
//   rays      samples o + t d, composited by ray.h, a warp a ray: whole rays in a tile, or the tiles
//             of one ray, forward in turn, then compositing, then back from the last one on, all
//             but that one forward again: 2 n − 1 forward passes of n tiles, where what they keep
//             would take the shared memory. raw, r̄aw and compositing are float32. In fp16 δ of a
//             tile's samples has a power of two of its own, undone where sums are added: with a last
//             interval of 1e10 adjoints reach 1e20
//
// A block of 4 or 8 warps owns the tile; a warp owns 16 points times 8 kN features of each layer,
// and 16 x 8 kM of each weight's gradient, whose sums it alone touches. The first and the last layer
// are float32 multiply-adds whatever the mode; so is the input of the last. Kept from forward to
// backward: h in the operands' format, and φ' (16-bit modes: two bytes, the phase of a sine or φ'
// in fp16). All sums have a fixed order.
//
// Floors, T = 1024 tasks of N = 1024 points, 2-Wx3-3 (depth 4), one gradient step on an H200, at
// 790 TFLOP/s in 16 bit, 4.2e12 sines and cosines a second (16 a cycle and multiprocessor) and 128
// bytes of shared memory a cycle (33 TB/s); 5 steps at width 64: 0.34 to 0.48 ms.
//
//   width  FLOP a point  products   2 · 3 W sines   through shared memory, this tiling
//   16     3.5 k         5 µs       24 µs           1.8 KB a point, 57 µs
//   32     13 k          17 µs      48 µs           4.5 KB, 143 µs
//   64     51 k          69 µs      96 µs           10 KB, 320 µs
//
// So the special function unit is the floor, and shared memory what bounds this tiling: 42, 33 and
// 30 % of the floor at best (counted, not timed). Of the 10 KB a point at width 64 the fragments of
// the products are 4.5, the edge layers 2.5, the gradients' sums 1, slopes and h the rest. Next: the
// sums in registers, 32 points a warp. Device memory: θ read twice and written once a step, 100 KB
// a task at width 64, 25 µs for 1024 tasks.
//
//   width  threads  points (dual)  registers (dual)  KiB of shared memory at depth 4 (dual)
//   16     128      64 (64)        128 (168)         16-bit 30 (61), others 43 (76)
//   32     128      64 (32)        128 (168)         47 (65), 74 (85)
//   64     256      64 (32)        128 (192)         113 (157): two blocks a multiprocessor
//   64     256      32 (16)        147 (134)         fp32 and tf32: 122 (160)
//
// Registers as ptxas 13.0 reports them on sm_90, of the inner loops' kernels on points; single passes
// take no more. Spills: a register or two, once a pass, of the plain inner loops in 16 bit (sm_80:
// three).
//
// Rich kernels, nerf_mlp of depth 4 on 60 features, rays of 128 samples; no spills:
//
//   width  threads  points (dual)  registers (dual)  KiB of shared memory (dual)
//   16     128      64 (64)        165 (234)         16-bit 58 (102), others 86 (147)
//   32     128      64 (32)        168 (228)         70 (94), 112 (134)
//   64     256      32 (32)        181 (248)         116 (202)
//   64     256      32 (16)        167 (190)         fp32 and tf32: 166 (223)
//
// Of 227 KiB: width 64 in 16 bit goes to depth 6 on 120 features (207), dual to depth 4 on 64.
// A sample's gradient at width 64 in 16 bit: 67 kFLOP, of several tiles 86 k; 60 sines of features,
// 105; 10 exponentials twice. 2^20 samples: 114 µs of products, 30 µs on the special function unit,
// and about 15 KB a sample, 480 µs, through shared memory, which bounds this tiling too (counted,
// not timed). While a ray of several tiles is composited the other warps wait: 5 scans of 5
// exchanges for each 32 samples.
//
// Dropped: rows of 16-bit operands padded by 16 bytes (117 KiB at width 64: one block a
// multiprocessor); slopes in float32 in the 16-bit modes (141 KiB).
#pragma once

#include "../abi.h"
#include "../math/loss.h"
#include "../math/philox.h"
#include "number.h"
#include "ray.h"

namespace fastmeta {

constexpr int kMaxInputs = 4, kMaxOutputs = 8;

FM_HOST_DEVICE constexpr int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Rich kernels take encodings and rays too; the others stay as small as bare points let them.
template <Mode kMode_, int kH, bool kDual_, bool kRich_ = false>
struct Shape {
  static constexpr Mode kMode = kMode_;
  static constexpr bool kDual = kDual_, kRich = kRich_, kShort = is_short(kMode_);
  static constexpr int kWidth = kH;
  static constexpr int kWarps = kH == 64 ? 8 : 4, kThreads = 32 * kWarps;
  // a multiprocessor holds at least, as far as registers go
  static constexpr int kBlocks =
      kH == 64 ? (kShort && !kDual && !kRich ? 2 : 1) : (kDual ? 3 : 4) - kRich;
  static constexpr int kPoints =
      kH == 16   ? 64
      : kH == 32 ? (kDual ? 32 : 64)
                 : (kShort ? (kRich && !kDual ? 32 : 64) : 32) / (kDual ? 2 : 1);
  static constexpr int kN = kH * kPoints / (128 * kWarps);
  static constexpr int kM = kH == 16 ? 2 : kH * kH / (128 * kWarps);
  static constexpr int kStrips = kPoints / 16;              // of 16 points
  static constexpr int kUnits = kH / 16 * (kH / (8 * kM));  // warps that own gradients
  static constexpr int kPlanes = kDual ? 2 : 1;             // value and tangent
  static constexpr int kTop = kH + 4;              // of the float32 input of the last layer
  static constexpr int kSegments = kThreads / kH;  // of points, in the sums of the edge layers
  static constexpr int kEdgeSums = kMaxInputs + 1 + kMaxOutputs + 1;
  // fp16 needs a power of two for each tile of samples: their adjoints span what it cannot
  static constexpr bool kLifts = kRich && kMode_ == Mode::kFp16;
  static constexpr int kSlot = kDual ? 8 : kShort ? 2 : 4;  // bytes of a kept slope
};

// Where everything lies in shared memory, in bytes.
struct Layout {
  int depth, inputs, outputs, encoded, chunks;  // chunks: of kH features
  int weights, hidden, top, slopes, sums, bias_sums, first, biases, last, last_bias, points, index,
      ends, scratch, features, raw, times, kept, samples, size;
};

template <class S>
FM_HOST_DEVICE Layout layout_of(int depth, int inputs = 0, int outputs = 0, int encoded = 0,
                                int samples = 0) {
  const int operand = static_cast<int>(sizeof(Operand<S::kMode>)), inner = depth - 2;
  Layout y = {};
  y.depth = depth;
  y.inputs = inputs;
  y.outputs = outputs;
  y.encoded = S::kRich ? encoded : 0;
  y.chunks = (y.encoded + S::kWidth - 1) / S::kWidth;
  const int matrices = inner + y.chunks;
  const auto take = [&](int bytes) {
    const int at = y.size;
    y.size += rounded_up(bytes, 16);
    return at;
  };
  y.weights = take(S::kPlanes * matrices * S::kWidth * kRow<S::kMode, S::kWidth> * operand);
  const int tile = S::kPlanes * S::kPoints * kRow<S::kMode, S::kWidth> * operand;
  y.hidden = take((inner || !y.chunks ? inner : 1) * tile);
  y.top = take(S::kPlanes * S::kPoints * S::kTop * 4);
  const int kept = (depth - 1) * S::kPoints * S::kWidth * S::kSlot;
  const int edges = S::kEdgeSums * S::kThreads * 4;  // there at the end of a pass
  y.slopes = take(kept > edges ? kept : edges);
  y.sums = take(matrices * 4 * S::kM * S::kThreads * 4);
  y.bias_sums = take((y.chunks ? inner + 1 : inner) * S::kWidth * 4);
  y.first = take(S::kPlanes * S::kWidth * kMaxInputs * 4);
  y.biases = take(S::kPlanes * (depth - 1) * S::kWidth * 4);
  y.last = take(S::kPlanes * S::kWidth * kMaxOutputs * 4);
  y.last_bias = take(S::kPlanes * kMaxOutputs * 4);
  y.points = take(S::kPlanes * S::kPoints * kMaxInputs * 4);
  y.index = take(S::kPoints * 4);
  y.ends = take(S::kPlanes * S::kPoints * kMaxOutputs * 4);
  y.scratch = take(32 * 4);
  if constexpr (S::kRich) {
    y.features = take(y.chunks * tile);
    if (samples) {
      y.samples = samples > S::kPoints ? samples : S::kPoints;
      y.raw = take(S::kPlanes * y.samples * 4 * 4);
      y.times = take(y.samples * 4);
      y.kept = take(S::kPlanes * y.samples / 2 * 4);  // of rays of two samples, the most
    }
  }
  return y;
}

FM_DEVICE float quad_sum_of(float x) { return quad_sum(x); }
FM_DEVICE Dual<float> quad_sum_of(Dual<float> x) { return {quad_sum(x.a), quad_sum(x.d)}; }

// What a pass over a task's points reads and leaves.
struct Pass {
  const Data* data = nullptr;
  int64_t task = 0;
  uint32_t step = 0;          // of the draw
  int share = 0, shares = 1;  // of the task's tiles: every so many from that one on
  bool back = false;
  const float* gy = nullptr;  // ȳ of the points; null: of the loss
  const float* w = nullptr;   // tangent of the points; null: none
  float* y = nullptr;         // y, or ẏ
  float* gx = nullptr;
  float scale = 1, along = 1;  // powers of two on adjoints and on tangents, undone by who reads
};

// A tile's place among the points or rays of a pass.
struct Group {
  int start = 0, count = 0;  // its first point or ray, and how many there are
  int rays = 0;              // 0: points
  int tile = 0;              // of a ray that has several
  bool again = false;        // r̄aw is there
};

// Whole rays a tile holds, or the one that takes several tiles.
template <class S>
FM_HOST_DEVICE int rays_of_tile(int samples) {
  return samples < S::kPoints ? S::kPoints / samples : 1;
}

template <class S>
struct Block {
  static constexpr Mode kMode = S::kMode;
  static constexpr bool kDual = S::kDual;
  static constexpr int kH = S::kWidth, kN = S::kN, kM = S::kM, kPlanes = S::kPlanes;
  using Number = NumberOf<kDual>;
  using Op = Operand<kMode>;
  struct Sums {
    float first[kMaxInputs], first_bias, last[kMaxOutputs], last_bias;
  };

  const Job& job;
  char* base;
  const Layout& at;
  const int &depth, &inputs, &outputs;
  int tid, warp, row, column, g, t;
  Sums sums;
  float loss;

  FM_DEVICE Block(const Job& j, const Layout& layout)
      : job(j),
        base(shared_memory()),
        at(layout),
        depth(layout.depth),
        inputs(layout.inputs),
        outputs(layout.outputs),
        tid(thread_index()) {
    const int lane = tid % 32;
    warp = tid / 32;
    row = warp % S::kStrips * 16;  // the warp's points and features of every layer
    column = warp / S::kStrips * 8 * kN;
    g = lane / 4;
    t = lane % 4;
    sums = {};
    loss = 0;
  }

  FM_DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(base + offset); }
  // Element i of a float array of that many numbers a plane.
  FM_DEVICE Number load(int offset, int count, int i) const {
    const float* p = floats(offset);
    if constexpr (kDual) {
      return {p[i], p[count + i]};
    } else {
      return p[i];
    }
  }
  FM_DEVICE void store(int offset, int count, int i, Number x) const {
    floats(offset)[i] = value(x);
    if constexpr (kDual) floats(offset)[count + i] = x.d;
  }
  FM_DEVICE Number weight_first(int feature, int input) const {
    return load(at.first, kH * kMaxInputs, feature * kMaxInputs + input);
  }
  // Four numbers from place 4 i on, in one load for each plane.
  struct alignas(16) Words {
    float w[4];
  };
  struct Four {
    Number x[4];
  };
  FM_DEVICE Four load_four(int offset, int count, int i) const {
    const Words values = reinterpret_cast<const Words*>(base + offset)[i];
    Four four;
    if constexpr (kDual) {
      const Words along = reinterpret_cast<const Words*>(base + offset)[count / 4 + i];
      FM_UNROLL for (int c = 0; c < 4; ++c) four.x[c] = {values.w[c], along.w[c]};
    } else {
      FM_UNROLL for (int c = 0; c < 4; ++c) four.x[c] = values.w[c];
    }
    return four;
  }
  // Outputs 4 q to 4 q + 3: the last layer's weights of a feature, δ_L of a point; 0 where there are
  // none.
  FM_DEVICE Four weights_last(int feature, int q) const {
    return load_four(at.last, kH * kMaxOutputs, feature * (kMaxOutputs / 4) + q);
  }
  FM_DEVICE Four ends(int p, int q) const {
    return load_four(at.ends, S::kPoints * kMaxOutputs, p * (kMaxOutputs / 4) + q);
  }
  FM_DEVICE Number bias(int layer, int feature) const {
    return load(at.biases, (depth - 1) * kH, layer * kH + feature);
  }
  FM_DEVICE Number point(int p, int input) const {
    return load(at.points, S::kPoints * kMaxInputs, p * kMaxInputs + input);
  }
  FM_DEVICE Number top(int p, int feature) const {
    return load(at.top, S::kPoints * S::kTop, p * S::kTop + feature);
  }
  FM_DEVICE Number end(int p, int output) const {
    return load(at.ends, S::kPoints * kMaxOutputs, p * kMaxOutputs + output);
  }
  FM_DEVICE Op* operands(int offset) const { return reinterpret_cast<Op*>(base + offset); }
  // Weights between hidden layers l and l + 1, [out, in].
  FM_DEVICE Op* weights(int l, int plane) const {
    return operands(at.weights) + (plane * matrices() + l) * kH * kRow<kMode, kH>;
  }
  // Products of operands in a pass: between hidden layers, and of the chunks of features after them.
  FM_DEVICE int matrices() const { return S::kRich ? depth - 2 + at.chunks : depth - 2; }
  FM_DEVICE bool encodes() const { return S::kRich && at.chunks > 0; }
  FM_DEVICE int first_inputs() const { return encodes() ? at.encoded : inputs; }
  FM_DEVICE Op* features(int chunk, int plane) const {
    return operands(at.features) + (plane * at.chunks + chunk) * S::kPoints * kRow<kMode, kH>;
  }
  // δ_1 where there are features: in the place of the first h, or at depth 2 in one of its own.
  FM_DEVICE Op* first_delta(int plane) const {
    const int planes = depth > 3 ? depth - 2 : 1;
    return operands(at.hidden) + plane * planes * S::kPoints * kRow<kMode, kH>;
  }
  // h of hidden layer l, later δ of it. The last hidden layer's h is float32 (top); its δ, in the
  // operands' format, takes that place.
  FM_DEVICE Op* hidden(int l, int plane) const {
    constexpr int kSize = S::kPoints * kRow<kMode, kH>;
    return l < depth - 2 ? operands(at.hidden) + (plane * (depth - 2) + l) * kSize
                         : operands(at.top) + plane * kSize;
  }
  FM_DEVICE Matrix<kMode, kH> matrix(const Op* p) const { return {p}; }

  // Parameters ---

  // A row of natural parameters to shared memory: operands, and what the edge layers read; times a
  // power of two.
  FM_DEVICE void load_parameters(const float* theta, int plane, float scale) {
    if (encodes()) {
      load_chunks(theta, plane, scale);
    } else {
      for (int i = tid; i < kH * kMaxInputs; i += S::kThreads) {
        const int d = i % kMaxInputs;
        floats(at.first)[plane * kH * kMaxInputs + i] =
            d < inputs ? scale * theta[i / kMaxInputs * inputs + d] : 0.0f;
      }
    }
    const float* from = theta + kH * first_inputs();
    for (int l = 0; l < depth - 1; ++l) {
      float* to = floats(at.biases) + (plane * (depth - 1) + l) * kH;
      for (int i = tid; i < kH; i += S::kThreads) to[i] = scale * from[i];
      from += kH;
      if (l == depth - 2) break;
      Op* w = weights(l, plane);
      for (int i = tid; i < kH * kH / 2; i += S::kThreads) {
        const int o = 2 * i / kH, c = 2 * i % kH;
        store_pair<kMode>(w + place<kMode, kH>(o, c), scale * from[2 * i], scale * from[2 * i + 1]);
      }
      from += kH * kH;
    }
    for (int i = tid; i < kH * kMaxOutputs; i += S::kThreads) {
      const int c = i % kMaxOutputs;
      floats(at.last)[plane * kH * kMaxOutputs + i] =
          c < outputs ? scale * from[c * kH + i / kMaxOutputs] : 0.0f;
    }
    from += kH * outputs;
    for (int i = tid; i < outputs; i += S::kThreads)
      floats(at.last_bias)[plane * kMaxOutputs + i] = scale * from[i];
  }

  // W_1 on features, a matrix for each chunk; columns past the last feature are 0.
  FM_DEVICE void load_chunks(const float* theta, int plane, float scale) {
    const int E = at.encoded;
    for (int i = tid; i < at.chunks * kH * kH / 2; i += S::kThreads) {
      const int chunk = i / (kH * kH / 2), o = 2 * i / kH % kH, c = 2 * i % kH, f = chunk * kH + c;
      const float* from = theta + o * E + f;
      store_pair<kMode>(weights(depth - 2 + chunk, plane) + place<kMode, kH>(o, c),
                        f < E ? scale * from[0] : 0.0f, f + 1 < E ? scale * from[1] : 0.0f);
    }
  }

  // f(i, ḡ_i) for the sums of a product that this thread owns, at from + (out, in) of rows so long;
  // columns from `columns` on are none.
  template <class F>
  FM_DEVICE void each_of_matrix(int which, int from, int row_length, int columns, F&& f) const {
    if (warp >= S::kUnits) return;
    const float* mine = floats(at.sums) + which * 4 * kM * S::kThreads + tid;
    const int o = warp % (kH / 16) * 16 + g, c = warp / (kH / 16) * 8 * kM + 2 * t;
    for (int j = 0; j < kM; ++j)
      for (int e = 0; e < 4; ++e)
        if (!S::kRich || c + 8 * j + e % 2 < columns)
          f(from + (o + e / 2 * 8) * row_length + c + 8 * j + e % 2,
            mine[(4 * j + e) * S::kThreads]);
  }

  // f(i, ḡ_i) for the natural parameters that this thread answers for, each once, after a pass.
  template <class F>
  FM_DEVICE void each_gradient(F&& f) const {
    const float* edges = floats(at.slopes);
    const auto over_segments = [&](int which, int feature) {
      float sum = 0;
      for (int s = 0; s < S::kSegments; ++s) sum += edges[which * S::kThreads + s * kH + feature];
      return sum;
    };
    if (encodes()) {
      for (int chunk = 0; chunk < at.chunks; ++chunk)
        each_of_matrix(depth - 2 + chunk, chunk * kH, at.encoded, at.encoded - chunk * kH, f);
    } else {
      for (int i = tid; i < kH * inputs; i += S::kThreads)
        f(i, over_segments(i % inputs, i / inputs));
    }
    int from = kH * first_inputs();
    const float* first_bias = floats(at.bias_sums) + (depth - 2) * kH;
    for (int i = tid; i < kH; i += S::kThreads)
      f(from + i, encodes() ? first_bias[i] : over_segments(kMaxInputs, i));
    from += kH;
    for (int l = 0; l < depth - 2; ++l) {
      each_of_matrix(l, from, kH, kH, f);
      from += kH * kH;
      for (int i = tid; i < kH; i += S::kThreads) f(from + i, floats(at.bias_sums)[l * kH + i]);
      from += kH;
    }
    for (int i = tid; i < kH * outputs; i += S::kThreads)
      f(from + i, over_segments(kMaxInputs + 1 + i / kH, i % kH));
    from += kH * outputs;
    for (int i = tid; i < outputs; i += S::kThreads)
      f(from + i, over_segments(kMaxInputs + 1 + kMaxOutputs, i));
  }

  // One number of all threads: the sum, or the largest; every thread gets it.
  template <class F>
  FM_DEVICE float over_block(float mine, F&& of_warp) {
    float* all = floats(at.scratch);
    mine = of_warp(mine);
    FM_MEET();  // the last number has been read
    if (tid % 32 == 0) all[warp] = mine;
    FM_MEET();
    return of_warp(tid % 32 < S::kWarps ? all[tid % 32] : 0.0f);
  }
  FM_DEVICE float block_sum(float x) {
    return over_block(x, [](float y) { return warp_sum(y); });
  }
  FM_DEVICE float block_max(float x) {
    return over_block(x, [](float y) { return warp_max(y); });
  }
  // The power of two that brings the largest of |p_i| to [½, 1); 1 where all are 0. Only fp16 needs
  // it.
  FM_DEVICE float power_for(const float* p, int64_t count, float other = 0) {
    if constexpr (kMode != Mode::kFp16) return 1.0f;
    float largest = other;
    for (int64_t i = tid; i < count; i += S::kThreads) {
      const float x = abs(p[i]);
      largest = x > largest ? x : largest;
    }
    return power_of(block_max(largest));
  }

  // Slopes ---

  FM_DEVICE Number slope(int l, int i, float w0, bool sine) const {
    const int place = (l * 4 * kN + i) * S::kThreads + tid;
    if constexpr (kDual) {
      const float* p = floats(at.slopes) + 2 * place;
      return {p[0], p[1]};
    } else if constexpr (S::kShort) {
      const uint16_t u = reinterpret_cast<const uint16_t*>(base + at.slopes)[place];
      if (!sine) return half_value(u);
      return w0 * cosine_of_reduced(static_cast<float>(static_cast<int16_t>(u)) *
                                    9.5873799242852573e-05f);
    } else {
      return floats(at.slopes)[place];
    }
  }
  // phase: w0 z reduced, where the activation is a sine.
  FM_DEVICE void keep_slope(int l, int i, Number x, float phase, bool sine) const {
    const int place = (l * 4 * kN + i) * S::kThreads + tid;
    if constexpr (kDual) {
      float* p = floats(at.slopes) + 2 * place;
      p[0] = x.a;
      p[1] = x.d;
    } else if constexpr (S::kShort) {
      uint16_t u;
      if (sine) {  // 2π are 65536; π itself wraps to −π
        u = static_cast<uint16_t>(static_cast<int>(::rintf(phase * 10430.378350470453f)));
      } else {
        u = static_cast<uint16_t>(pack_half(x, 0.0f));
      }
      reinterpret_cast<uint16_t*>(base + at.slopes)[place] = u;
    } else {
      floats(at.slopes)[place] = x;
    }
  }

  // Forward ---

  FM_DEVICE static bool marches(const Pass& pass) {
    return S::kRich && pass.data->measure == Measure::k_march;
  }
  FM_DEVICE int64_t points_of(const Pass& pass) const {
    const Data& d = *pass.data;
    return d.per_step ? d.per_step : d.counts ? d.counts[pass.task] : d.points;
  }

  // Samples o + t d of a tile's rays, t = linspace(near, far, S) plus jitter; which rays they are
  // (−1: none).
  FM_DEVICE void load_samples(const Pass& pass, const Group& group) {
    const Data& d = *pass.data;
    const int count = static_cast<int>(d.march.samples);
    const float near = static_cast<const float*>(d.near)[pass.task];
    const float range = static_cast<const float*>(d.far)[pass.task] - near;
    for (int p = tid; p < S::kPoints; p += S::kThreads) {
      const int sample = group.tile * S::kPoints + p, ray = sample / count;
      const int64_t unit = group.start + ray;
      const bool there = ray < group.rays && unit < group.count;
      const int index = there ? unit_index(pass, unit) : -1;
      reinterpret_cast<int*>(base + at.index)[p] = index;
      float time = 0;
      if (there) {
        const int s = sample - ray * count;
        time = near + range * (static_cast<float>(s) / static_cast<float>(count - 1));
        if (d.seed)
          time += range / static_cast<float>(count) *
                  draw_uniform(d.seed[pass.task], static_cast<uint32_t>(unit * count + s),
                               pass.step, kJitter);
        floats(at.times)[sample] = time;
      }
      const int64_t from = (pass.task * d.points + index) * 3;
      for (int i = 0; i < kMaxInputs; ++i) {
        const bool given = there && i < 3;
        const float o = given ? static_cast<const float*>(d.origins)[from + i] : 0.0f;
        const float v = given ? static_cast<const float*>(d.directions)[from + i] : 0.0f;
        store(at.points, S::kPoints * kMaxInputs, p * kMaxInputs + i, plain_number(o + time * v));
      }
    }
  }
  FM_DEVICE static Number plain_number(float x) {
    if constexpr (kDual) {
      return {x, 0.0f};
    } else {
      return x;
    }
  }

  // Which of the data the points or rays of a step are: all, or drawn.
  FM_DEVICE int unit_index(const Pass& pass, int64_t unit) const {
    const Data& d = *pass.data;
    if (!d.per_step) return static_cast<int>(unit);
    const int64_t upper = d.counts ? d.counts[pass.task] : d.points;
    return static_cast<int>(draw_integer(d.seed[pass.task], static_cast<uint32_t>(unit), pass.step,
                                         kPoints, static_cast<uint32_t>(upper)));
  }

  // The tile's coordinates, and which rows of the data they are (−1: none).
  FM_DEVICE void load_points(const Pass& pass, int start, int count) {
    const Data& d = *pass.data;
    for (int p = tid; p < S::kPoints; p += S::kThreads) {
      int index = -1;
      if (start + p < count) index = unit_index(pass, start + p);
      reinterpret_cast<int*>(base + at.index)[p] = index;
      const int64_t from = pass.task * d.x_stride + static_cast<int64_t>(index) * inputs;
      const float* x = static_cast<const float*>(d.x);
      float* to = floats(at.points) + p * kMaxInputs;
      for (int i = 0; i < kMaxInputs; ++i) {
        const bool there = index >= 0 && i < inputs;
        to[i] = there ? x[from + i] : 0.0f;
        if constexpr (kDual) {
          const int64_t along = static_cast<int64_t>(index) * inputs + i;
          to[S::kPoints * kMaxInputs + i] = there && pass.w ? pass.along * pass.w[along] : 0.0f;
        }
      }
    }
  }

  // Features ---

  // Feature f of a point, and its slope along q.
  template <bool kSlope>
  FM_DEVICE Number feature(int p, int f, Number& slope) const {
    slope = {};
    if (f >= at.encoded) return Number{};
    const float* basis = static_cast<const float*>(job.net.basis) + f;
    Number q = {}, h;
    FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
      if (i < inputs) q = plus_product(q, point(p, i), plain_number(basis[i * at.encoded]));
    }
    q = q + static_cast<const float*>(job.net.phase)[f];
    if (f < static_cast<int>(job.net.identity)) {
      slope = plain_number(1.0f);
      return q;
    }
    float phase = 0;
    bend<kMode, kDual || kSlope, Activation::k_sine>(q, 1.0f, h, slope, phase);
    return h;
  }

  FM_DEVICE void write_features() const {
    const int pairs = at.chunks * kH / 2;
    for (int i = tid; i < S::kPoints * pairs; i += S::kThreads) {
      const int p = i / pairs, f = i % pairs * 2;
      Number slope;
      const Number low = feature<false>(p, f, slope), high = feature<false>(p, f + 1, slope);
      const int to = place<kMode, kH>(p, f % kH);
      store_pair<kMode>(features(f / kH, 0) + to, value(low), value(high));
      if constexpr (kDual) store_pair<kMode>(features(f / kH, 1) + to, low.d, high.d);
    }
  }

  // h of hidden layer l from its z, written with its slopes.
  FM_DEVICE void finish_layer(int l, float (&z)[kPlanes][kN][4]) {
    const float w0 = static_cast<float>(l == 0 ? job.net.w0_first : job.net.w0);
    with_activation(job.net.activation, [&](auto tag) {
      constexpr Activation kKind = decltype(tag)::kValue;
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) {
          const Number b = bias(l, column + 8 * j + 2 * t + e % 2);
          Number x, h, first;
          float phase = 0;
          if constexpr (kDual) {
            x = {z[0][j][e] + b.a, z[1][j][e] + b.d};
          } else {
            x = z[0][j][e] + b;
          }
          bend<kMode, kDual || !S::kShort, kKind>(x, w0, h, first, phase);
          keep_slope(l, 4 * j + e, first, phase, kKind == Activation::k_sine);
          z[0][j][e] = value(h);
          if constexpr (kDual) z[1][j][e] = h.d;
        }
      }
    });
    if (l == depth - 2) {
      write_top(z);
    } else {
      write_hidden(l, z);
    }
  }
  FM_DEVICE void write_top(const float (&h)[kPlanes][kN][4]) const {
    FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) {
          const int p = row + g + e / 2 * 8, c = column + 8 * j + 2 * t + e % 2;
          floats(at.top)[(plane * S::kPoints + p) * S::kTop + c] = h[plane][j][e];
        }
      }
    }
  }
  FM_DEVICE void write_hidden(int l, const float (&h)[kPlanes][kN][4]) const {
    write_matrix(hidden(l, 0), kDual ? hidden(l, 1) : nullptr, h);
  }
  FM_DEVICE void write_matrix(Op* values, Op* tangents, const float (&h)[kPlanes][kN][4]) const {
    FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      Op* to = plane ? tangents : values;
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        const int c = column + 8 * j + 2 * t;
        store_pair<kMode>(to + place<kMode, kH>(row + g, c), h[plane][j][0], h[plane][j][1]);
        store_pair<kMode>(to + place<kMode, kH>(row + g + 8, c), h[plane][j][2], h[plane][j][3]);
      }
    }
  }

  // z += h Wᵀ of the warp's points and features.
  FM_DEVICE void add_product(float (&z)[kPlanes][kN][4], const Op* values, const Op* tangents,
                             int which) const {
    const Matrix<kMode, kH> h = matrix(values), w = matrix(weights(which, 0));
    multiply<kMode, kN, false, true>(z[0], h, row, w, column, kH);
    if constexpr (kDual) {
      multiply<kMode, kN, false, true>(z[1], h, row, matrix(weights(which, 1)), column, kH);
      multiply<kMode, kN, false, true>(z[1], matrix(tangents), row, w, column, kH);
    }
  }
  // h̄ = δ W, over what delta holds.
  FM_DEVICE void pull_back(float (&delta)[kPlanes][kN][4], const Op* values, const Op* tangents,
                           int which) const {
    clear(delta);
    const Matrix<kMode, kH> d = matrix(values), w = matrix(weights(which, 0));
    multiply<kMode, kN, false, false>(delta[0], d, row, w, column, kH);
    if constexpr (kDual) {
      multiply<kMode, kN, false, false>(delta[1], matrix(tangents), row, w, column, kH);
      multiply<kMode, kN, false, false>(delta[1], d, row, matrix(weights(which, 1)), column, kH);
    }
  }

  FM_DEVICE void forward_hidden() {
    for (int l = 0; l < depth - 1; ++l) {
      float z[kPlanes][kN][4] = {};
      if (l == 0 && encodes()) {
        FM_UNROLL_1 for (int c = 0; c < at.chunks; ++c) {
          add_product(z, features(c, 0), features(c, 1), depth - 2 + c);
        }
      } else if (l == 0) {
        FM_UNROLL for (int j = 0; j < kN; ++j) {
          FM_UNROLL for (int e = 0; e < 4; ++e) {
            const int p = row + g + e / 2 * 8, c = column + 8 * j + 2 * t + e % 2;
            Number sum = {};
            FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
              if (i < inputs) sum = plus_product(sum, point(p, i), weight_first(c, i));
            }
            z[0][j][e] = value(sum);
            if constexpr (kDual) z[1][j][e] = sum.d;
          }
        }
      } else {
        add_product(z, hidden(l - 1, 0), kDual ? hidden(l - 1, 1) : nullptr, l - 1);
      }
      finish_layer(l, z);
      FM_MEET();
    }
  }

  // y, the loss and δ_L of a tile; four lanes share a point.
  FM_DEVICE void finish_points(const Pass& pass, const Group& group, float mean) {
    const Data& d = *pass.data;
    const float clamp = d.clamp > 0 ? static_cast<float>(d.clamp) : INFINITY;
    for (int item = tid; item < 4 * S::kPoints; item += S::kThreads) {
      const int p = item / 4, part = item % 4;
      const int64_t index = reinterpret_cast<const int*>(base + at.index)[p];
      Number z[kMaxOutputs] = {};
      for (int i = part; i < kH; i += 4) {
        const Number h = top(p, i);
        FM_UNROLL for (int q = 0; q < kMaxOutputs / 4; ++q) {
          if (4 * q >= outputs) continue;
          const Four w = weights_last(i, q);
          FM_UNROLL for (int c = 0; c < 4; ++c) z[4 * q + c] =
              plus_product(z[4 * q + c], h, w.x[c]);
        }
      }
      Number mine[2] = {};  // of outputs part and part + 4
      FM_UNROLL for (int c = 0; c < kMaxOutputs; ++c) {
        if (c < outputs) {
          const Number sum = quad_sum_of(z[c]) + load(at.last_bias, kMaxOutputs, c);
          if (c % 4 == part) mine[c / 4] = sum;
        }
      }
      FM_UNROLL_1 for (int c = part; c < outputs; c += 4) {
        finish_output(pass, group, mean, clamp, p, index, c, c < 4 ? mine[0] : mine[1]);
      }
      const int beyond = outputs / 4 * 4 + part;  // what ends() fills its four with
      if (beyond >= outputs && beyond < kMaxOutputs) {
        store(at.ends, S::kPoints * kMaxOutputs, p * kMaxOutputs + beyond, Number{});
      }
    }
  }
  FM_DEVICE void finish_output(const Pass& pass, const Group& group, float mean, float clamp, int p,
                               int64_t index, int c, Number z) {
    const Data& d = *pass.data;
    Number y = {}, slope = {}, delta = {};
    with_output(job.net.output,
                [&](auto tag) { activate<decltype(tag)::kValue>(z, 1.0f, y, slope); });
    y = y + static_cast<float>(job.net.shift);
    if (S::kRich && group.rays) {
      const int place = (group.tile * S::kPoints + p) * 4 + c;
      if (index >= 0) delta = slope;  // times r̄aw, once that is known
      if (group.again) {
        if (index >= 0) delta = delta * load(at.raw, 4 * at.samples, place);
      } else if (index >= 0) {
        store(at.raw, 4 * at.samples, place, y);
      }
    } else if (index >= 0) {
      if (pass.y) pass.y[index * outputs + c] = kept(y) * (kDual ? 1.0f / pass.along : 1.0f);
      if (pass.gy) {
        delta = slope * (pass.scale * pass.gy[index * outputs + c]);
      } else if (d.y) {
        const float* targets = static_cast<const float*>(d.y);
        const int64_t from = (pass.task * d.points + index) * outputs + c;
        float ell;
        Number first;
        loss_terms(d.loss, clamp, y, targets[from], ell, first);
        loss = fused(ell, mean, loss);
        delta = slope * (first * (mean * pass.scale));
      }
    }
    store(at.ends, S::kPoints * kMaxOutputs, p * kMaxOutputs + c, delta);
  }

  // What the group's rays show, a warp a ray; their loss; r̄aw in the place of raw.
  FM_DEVICE void composite_rays(const Pass& pass, const Group& group, float mean) {
    const Data& d = *pass.data;
    const float clamp = d.clamp > 0 ? static_cast<float>(d.clamp) : INFINITY;
    const int count = static_cast<int>(d.march.samples);
    FM_UNROLL_1 for (int ray = warp; ray < group.rays; ray += S::kWarps) {
      const int64_t index = reinterpret_cast<const int*>(base + at.index)[ray * count];
      if (index < 0) break;
      const auto raw = [&](int64_t i, int c) {
        return load(at.raw, 4 * at.samples, (ray * count + static_cast<int>(i)) * 4 + c);
      };
      const auto time = [&](int64_t i) { return plain_number(floats(at.times)[ray * count + i]); };
      const WarpRay<kDual, decltype(raw), decltype(time)> walk(
          d.march, raw, time, floats(at.kept) + ray * kept_of_ray(count, kDual));
      const Shown<Number> shown = walk.forward();
      const float* target = static_cast<const float*>(d.y) + (pass.task * d.points + index) * 3;
      Shown<Number> bar = {};
      FM_UNROLL for (int c = 0; c < 3; ++c) {
        float ell;
        loss_terms(d.loss, clamp, shown.rgb[c], target[c], ell, bar.rgb[c]);
        bar.rgb[c] = bar.rgb[c] * mean;
        if (tid % 32 == c) loss = fused(ell, mean, loss);
      }
      if (!pass.back) continue;
      walk.backward(
          bar,
          [&](int64_t i, int c, Number x) {
            store(at.raw, 4 * at.samples, (ray * count + static_cast<int>(i)) * 4 + c, x);
          },
          [](int64_t, Number) {});
    }
  }
  // δ_L of a tile's samples from their r̄aw; each thread those whose φ' it left.
  FM_DEVICE void times_raw(const Group& group) const {
    for (int item = tid; item < 4 * S::kPoints; item += S::kThreads) {
      const int p = item / 4, c = item % 4;
      if (reinterpret_cast<const int*>(base + at.index)[p] < 0) continue;
      const Number adjoint = load(at.raw, 4 * at.samples, (group.tile * S::kPoints + p) * 4 + c);
      store(at.ends, S::kPoints * kMaxOutputs, p * kMaxOutputs + c, end(p, c) * adjoint);
    }
  }
  // The power of two that brings the tile's δ_L into fp16's range.
  FM_DEVICE float lift_of() {
    float largest = 0;
    for (int item = tid; item < 4 * S::kPoints; item += S::kThreads) {
      const Number x = end(item / 4, item % 4);
      largest = most(largest, abs(value(x)));
      if constexpr (kDual) largest = most(largest, abs(x.d));
    }
    return power_of(block_max(largest));
  }
  FM_DEVICE static float most(float a, float b) { return b > a ? b : a; }

  // Backward ---

  // The last layer's gradient, and δ of the last hidden layer.
  FM_DEVICE void leave_last(float (&delta)[kPlanes][kN][4], float lift) {
    const int feature = tid % kH;
    for (int p = tid / kH; p < S::kPoints; p += S::kSegments) {
      const Number h = top(p, feature);
      FM_UNROLL for (int q = 0; q < kMaxOutputs / 4; ++q) {
        if (4 * q >= outputs) continue;
        const Four d = ends(p, q);
        FM_UNROLL for (int c = 0; c < 4; ++c) {
          sums.last[4 * q + c] = kept(d.x[c], h, sums.last[4 * q + c]);
        }
      }
      if (feature < outputs) sums.last_bias += kept(end(p, feature));
    }
    clear(delta);
    FM_UNROLL_1 for (int q = 0; 4 * q < outputs; ++q) {
      const Four d[2] = {ends(row + g, q), ends(row + g + 8, q)};
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int right = 0; right < 2; ++right) {
          const Four w = weights_last(column + 8 * j + 2 * t + right, q);
          FM_UNROLL for (int low = 0; low < 2; ++low) {
            Number sum = get(delta, j, 2 * low + right);
            FM_UNROLL for (int c = 0; c < 4; ++c) sum = plus_product(sum, d[low].x[c], w.x[c]);
            put(delta, j, 2 * low + right, sum);
          }
        }
      }
    }
    times_slope(depth - 2, delta);
    if constexpr (S::kLifts) {
      FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
        FM_UNROLL for (int j = 0; j < kN; ++j) {
          FM_UNROLL for (int e = 0; e < 4; ++e) delta[plane][j][e] *= lift;
        }
      }
    }
  }

  // A fragment's element as a number.
  FM_DEVICE static Number get(const float (&f)[kPlanes][kN][4], int j, int e) {
    if constexpr (kDual) {
      return {f[0][j][e], f[1][j][e]};
    } else {
      return f[0][j][e];
    }
  }
  FM_DEVICE static void put(float (&f)[kPlanes][kN][4], int j, int e, Number x) {
    f[0][j][e] = value(x);
    if constexpr (kDual) f[1][j][e] = x.d;
  }
  FM_DEVICE static void clear(float (&f)[kPlanes][kN][4]) {
    FM_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      FM_UNROLL for (int j = 0; j < kN; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) f[plane][j][e] = 0;
      }
    }
  }

  FM_DEVICE void times_slope(int l, float (&delta)[kPlanes][kN][4]) const {
    const float w0 = static_cast<float>(l == 0 ? job.net.w0_first : job.net.w0);
    const bool sine = job.net.activation == Activation::k_sine;
    FM_UNROLL for (int j = 0; j < kN; ++j) {
      FM_UNROLL for (int e = 0; e < 4; ++e) {
        const Number first = slope(l, 4 * j + e, w0, sine);
        if constexpr (kDual) {
          const Dual<float> d = first * Dual<float>{delta[0][j][e], delta[1][j][e]};
          delta[0][j][e] = d.a;
          delta[1][j][e] = d.d;
        } else {
          delta[0][j][e] *= first;
        }
      }
    }
  }

  // W̄ of a product, W̄ += δᵀ h, in this thread's sums; and b̄, if with it. undo: of the tile's power
  // of two.
  FM_DEVICE void add_weight_gradient(int which, const Op* delta_a, const Op* delta_d, const Op* h_a,
                                     const Op* h_d, bool with_bias, int bias, float undo) {
    if (warp >= S::kUnits) return;
    float* mine = floats(at.sums) + which * 4 * kM * S::kThreads + tid;
    const int o = warp % (kH / 16) * 16, c = warp / (kH / 16) * 8 * kM;
    const bool first = c == 0 && with_bias;
    float sum[kM][4] = {}, ones[4] = {};
    if constexpr (!S::kLifts) {
      FM_UNROLL for (int j = 0; j < kM; ++j) {
        FM_UNROLL for (int e = 0; e < 4; ++e) sum[j][e] = mine[(4 * j + e) * S::kThreads];
      }
    }
    const Matrix<kMode, kH> delta = matrix(delta_a), h = matrix(h_a);
    if constexpr (kDual) {
      multiply<kMode, kM, true, false>(sum, matrix(delta_d), o, h, c, S::kPoints, first, ones);
      multiply<kMode, kM, true, false>(sum, delta, o, matrix(h_d), c, S::kPoints);
    } else {
      multiply<kMode, kM, true, false>(sum, delta, o, h, c, S::kPoints, first, ones);
    }
    FM_UNROLL for (int j = 0; j < kM; ++j) {
      FM_UNROLL for (int e = 0; e < 4; ++e) {
        float& to = mine[(4 * j + e) * S::kThreads];
        to = S::kLifts ? fused(undo, sum[j][e], to) : sum[j][e];
      }
    }
    if (first && t == 0) {
      float* to = floats(at.bias_sums) + bias * kH + o + g;
      to[0] = S::kLifts ? fused(undo, ones[0], to[0]) : to[0] + ones[0];
      to[8] = S::kLifts ? fused(undo, ones[2], to[8]) : to[8] + ones[2];
    }
  }

  FM_DEVICE void backward(const Pass& pass, float lift) {
    const float undo = S::kLifts ? 1.0f / lift : 1.0f;
    float delta[kPlanes][kN][4];
    leave_last(delta, lift);
    FM_MEET();  // top has been read
    for (int l = depth - 2; l > 0; --l) {
      write_hidden(l, delta);
      FM_MEET();
      const Op *d0 = hidden(l, 0), *d1 = kDual ? hidden(l, 1) : nullptr;
      add_weight_gradient(l - 1, d0, d1, hidden(l - 1, 0), kDual ? hidden(l - 1, 1) : nullptr, true,
                          l - 1, undo);
      pull_back(delta, d0, d1, l - 1);
      times_slope(l - 1, delta);
      FM_MEET();  // δ_l and h_{l-1} have been read
    }
    if (encodes()) return leave_features(pass, delta, undo);
    write_top(delta);
    FM_MEET();
    const int feature = tid % kH;
    for (int p = tid / kH; p < S::kPoints; p += S::kSegments) {
      Number d = top(p, feature);
      if constexpr (S::kLifts) d = d * undo;
      FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
        if (i < inputs) sums.first[i] = kept(d, point(p, i), sums.first[i]);
      }
      sums.first_bias += kept(d);
    }
    if (pass.gx) leave_points(pass);
  }

  // The first layer on features: its gradients, and x̄ where it is wanted.
  FM_DEVICE void leave_features(const Pass& pass, float (&delta)[kPlanes][kN][4], float undo) {
    const Op *d0 = first_delta(0), *d1 = kDual ? first_delta(1) : nullptr;
    write_matrix(first_delta(0), kDual ? first_delta(1) : nullptr, delta);
    FM_MEET();  // features: δ_1 is written
    FM_UNROLL_1 for (int c = 0; c < at.chunks; ++c) {
      add_weight_gradient(depth - 2 + c, d0, d1, features(c, 0), kDual ? features(c, 1) : nullptr,
                          c == 0, depth - 2, undo);
    }
    if (!pass.gx) return;
    FM_UNROLL_1 for (int c = 0; c < at.chunks; ++c) {
      pull_back(delta, d0, d1, depth - 2 + c);
      write_top(delta);
      FM_MEET();  // features: h̄_0 is written
      leave_points_of_chunk(pass, c);
      FM_MEET();  // features: top has been read
    }
  }
  // x̄ += (cos q ⊙ h̄_0) Bᵀ over the features of a chunk; four lanes share a point.
  FM_DEVICE void leave_points_of_chunk(const Pass& pass, int chunk) {
    const float undo = 1.0f / pass.scale * (kDual ? 1.0f / pass.along : 1.0f);
    const float* basis = static_cast<const float*>(job.net.basis) + chunk * kH;
    for (int item = tid; item < 4 * S::kPoints; item += S::kThreads) {
      const int p = item / 4, part = item % 4;
      const int64_t index = reinterpret_cast<const int*>(base + at.index)[p];
      float sum[kMaxInputs] = {};
      FM_UNROLL_1 for (int f = part; f < kH && chunk * kH + f < at.encoded; f += 4) {
        Number slope;
        feature<true>(p, chunk * kH + f, slope);
        const float h = kept(slope * top(p, f));
        FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
          if (i < inputs) sum[i] = fused(h, basis[i * at.encoded + f], sum[i]);
        }
      }
      FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
        const float all = quad_sum(sum[i]);
        if (part != i || i >= inputs || index < 0) continue;
        float* to = pass.gx + index * inputs + i;
        *to = chunk ? fused(undo, all, *to) : undo * all;
      }
    }
  }

  // x̄ = δ_1 W_1; four lanes share a point.
  FM_DEVICE void leave_points(const Pass& pass) {
    const float undo = 1.0f / pass.scale * (kDual ? 1.0f / pass.along : 1.0f);
    for (int item = tid; item < 4 * S::kPoints; item += S::kThreads) {
      const int p = item / 4, part = item % 4;
      const int64_t index = reinterpret_cast<const int*>(base + at.index)[p];
      FM_UNROLL for (int i = 0; i < kMaxInputs; ++i) {
        float sum = 0;
        for (int f = part; f < kH; f += 4) sum = kept(top(p, f), weight_first(f, i), sum);
        sum = quad_sum(sum);
        if (part == i && i < inputs && index >= 0) pass.gx[index * inputs + i] = undo * sum;
      }
    }
  }

  // The pass over a share of a task's points or rays: afterwards each_gradient gives the sums, and
  // the loss is returned, to every thread.
  //
  // A group is a tile of points, or the rays that fill a tile, or one ray of several tiles: these go
  // forward in turn, and back from the last one on, all but that one forward again.
  FM_DEVICE float run(const Pass& pass) {
    const Data& d = *pass.data;
    const bool rays = marches(pass);
    const int samples = rays ? static_cast<int>(d.march.samples) : 1;
    Group group;
    group.count = static_cast<int>(points_of(pass));
    const int units = rays ? rays_of_tile<S>(samples) : S::kPoints;
    const int tiles = rays ? (units * samples + S::kPoints - 1) / S::kPoints : 1;
    const float mean =
        1.0f / (static_cast<float>(group.count) * static_cast<float>(rays ? 3 : outputs));
    group.rays = rays ? units : 0;
    sums = {};
    loss = 0;
    if (pass.back) {
      for (int i = 0; i < matrices() * 4 * kM; ++i) floats(at.sums)[i * S::kThreads + tid] = 0.0f;
      const int biases = encodes() ? depth - 1 : depth - 2;
      for (int i = tid; i < biases * kH; i += S::kThreads) floats(at.bias_sums)[i] = 0.0f;
    }
    for (group.start = pass.share * units; group.start < group.count;
         group.start += pass.shares * units) {
      FM_UNROLL_1 for (int visit = 0; visit < (pass.back ? 2 * tiles - 1 : tiles); ++visit) {
        group.again = visit >= tiles;
        group.tile = group.again ? 2 * tiles - 2 - visit : visit;
        FM_MEET();  // the last tile's points have been read, or the parameters are written
        if (rays) {
          load_samples(pass, group);
        } else {
          load_points(pass, group.start, group.count);
        }
        FM_MEET();
        if (encodes()) {
          write_features();
          FM_MEET();  // features are written
        }
        forward_hidden();
        finish_points(pass, group, mean);
        if (rays && visit == tiles - 1) {
          FM_MEET();  // rays: raw is written
          composite_rays(pass, group, mean);
          FM_MEET();  // rays: r̄aw is written
          if (pass.back) times_raw(group);
        }
        if (!pass.back || visit < tiles - 1) continue;
        FM_MEET();
        backward(pass, S::kLifts && rays ? lift_of() : 1.0f);
      }
    }
    if (!pass.back) return block_sum(loss);
    float* edges = floats(at.slopes) + tid;
    for (int i = 0; i < kMaxInputs; ++i) edges[i * S::kThreads] = sums.first[i];
    edges[kMaxInputs * S::kThreads] = sums.first_bias;
    for (int c = 0; c < kMaxOutputs; ++c) edges[(kMaxInputs + 1 + c) * S::kThreads] = sums.last[c];
    edges[(S::kEdgeSums - 1) * S::kThreads] = sums.last_bias;
    return block_sum(loss);  // its meeting is the edges' too
  }
};

}  // namespace fastmeta
