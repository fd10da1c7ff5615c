// The small kernels around the products of layers (layered.h): features of points and back, weights
// on aligned rows, δ of the outputs, fp16's largest numbers, and an inner loop's step and walk back
// over the parameters of all tasks.
//
// A thread a number (encode_back: a warp a point), 128 a block, no shared memory, no barrier; sums of
// a warp by exchange, of more by a second kernel, in order. Registers 20 to 44, encode_back 53 (dual
// 62): ptxas 13.0, sm_90.
#pragma once

#include "layered.h"
#include "walk.h"

namespace fastmeta {

constexpr int kSmallThreads = 128, kSmallWarps = kSmallThreads / 32;

FM_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers from row to row of what the products read: 16 bytes a load.
FM_HOST_DEVICE int64_t row_of(int64_t features) { return (features + 3) / 4 * 4; }

// Where the weights of layers lie in aligned rows: those of layer l from weights_at(l) on, [out,
// row_of(in)]; bare coordinates' are read where they are.
FM_HOST_DEVICE int64_t weights_at(const Network& n, int64_t l) {
  const int64_t first = n.encoded ? n.width * row_of(n.encoded) : 0;
  if (l == 0) return 0;
  const int64_t before = first + (least(l, n.depth - 1) - 1) * n.width * row_of(n.width);
  return l < n.depth ? before : before + n.out * row_of(n.width);
}

// A task's weights to aligned rows: its parameters begin anywhere.
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    align(FM_CONSTANT Network n, const float* params, int64_t stride, int64_t tasks, float* to) {
  const int64_t size = weights_at(n, n.depth),
                item = static_cast<int64_t>(block_x()) * kSmallThreads + thread_index();
  if (item >= tasks * size) return;
  const int64_t task = item / size, i = item % size, first = weights_at(n, 1),
                each = n.width * row_of(n.width), E = encoded_features(n);
  const int64_t l = i < first ? 0 : least(n.depth - 1, 1 + (i - first) / each),
                in = l ? n.width : E, row = row_of(in), o = (i - weights_at(n, l)) / row,
                c = (i - weights_at(n, l)) % row,
                from = l ? n.width * (E + 1) + (l - 1) * n.width * (n.width + 1) : 0;
  to[item] = c < in ? params[task * stride + from + o * in + c] : 0.0f;
}

// h_0 of points: q in the identity columns, sin q in the others, q = x B + φ.
template <bool kDual>
FM_DEVICE void encode_one(const Network& net, const float* x, const float* w, int64_t f,
                          NumberOf<kDual>& h, NumberOf<kDual>& slope) {
  using Number = NumberOf<kDual>;
  const float *basis = static_cast<const float*>(net.basis) + f,
              *phase = static_cast<const float*>(net.phase);
  Number q = {};
  for (int64_t d = 0; d < net.in; ++d) {
    const float b = basis[d * net.encoded];
    if constexpr (kDual) {
      q = plus_product(q, Number{x[d], w ? w[d] : 0.0f}, Number{b, 0.0f});
    } else {
      q = plus_product(q, x[d], b);
    }
  }
  float unused;
  if (f < net.identity) {
    activate<Activation::k_none>(q + phase[f], 1.0f, h, slope);
  } else {
    bend<Mode::kFp32, true, Activation::k_sine>(q + phase[f], 1.0f, h, slope, unused);
  }
}

// Points from device memory: value and tangent, a row of them for each task.
struct Points {
  const float* at[2];
  int64_t task[2];
};

template <bool kDual>
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    encode(FM_CONSTANT Network net, FM_CONSTANT Points x, int64_t tasks, int64_t count,
           int64_t range, float* to) {
  const int64_t E = net.encoded, row = row_of(E),
                i = static_cast<int64_t>(block_x()) * kSmallThreads + thread_index();
  if (i >= tasks * count * E) return;
  const int64_t task = i / (count * E), m = i / E % count, f = i % E;
  NumberOf<kDual> h, slope;
  const float* w = kDual ? x.at[1] + task * x.task[1] + m * net.in : nullptr;
  encode_one<kDual>(net, x.at[0] + task * x.task[0] + m * net.in, w, f, h, slope);
  const int64_t at = (task * range + m) * row + f;
  to[at] = value(h);
  if constexpr (kDual) to[tasks * range * row + at] = h.d;
}

// x̄ = (h_0' ⊙ h̄_0) Bᵀ of points, dual its tangent: a warp a point, its lanes features in turn.
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    encode_back(FM_CONSTANT Network net, FM_CONSTANT Points x, int64_t tasks, int64_t count,
                int64_t range, const float* below, float* gx, int64_t gx_task) {
  const int64_t E = net.encoded, row = row_of(E),
                item = static_cast<int64_t>(block_x()) * kSmallWarps + thread_index() / 32;
  if (item >= tasks * count) return;
  const int64_t task = item / count, m = item % count;
  const float *at = x.at[0] + task * x.task[0] + m * net.in,
              *w = kDual && x.at[1] ? x.at[1] + task * x.task[1] + m * net.in : nullptr;
  for (int64_t d = 0; d < net.in; d += 4) {
    float sum[4] = {};
    for (int64_t f = thread_index() % 32; f < E; f += 32) {
      NumberOf<kDual> h, slope;
      encode_one<kDual>(net, at, w, f, h, slope);
      const int64_t from = (task * range + m) * row + f;
      float adjoint;
      if constexpr (kDual) {
        adjoint = kept(slope, {below[from], below[tasks * range * row + from]}, 0.0f);
      } else {
        adjoint = slope * below[from];
      }
      for (int i = 0; i < 4; ++i)
        if (d + i < net.in)
          sum[i] = fused(adjoint, static_cast<const float*>(net.basis)[(d + i) * E + f], sum[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const float whole = warp_sum(sum[i]);
      if (thread_index() % 32 == 0 && d + i < net.in)
        gx[task * gx_task + m * net.in + d + i] = whole;
    }
  }
}

FM_DEVICE void leave_peak(float largest, float* peaks) {
  largest = warp_max(largest);
  const int64_t warp = static_cast<int64_t>(block_x()) * blocks_y() + block_y();
  if (thread_index() % 32 == 0) peaks[warp * kSmallWarps + thread_index() / 32] = largest;
}
FM_DEVICE float larger(float x, float y) {
  y = abs(y);
  return y > x ? y : x;
}

// The largest of |v| and |w| of a task, one for each warp; blocks [tasks, slices].
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    peaks_along(const float* v, int64_t v_stride, int64_t v_count, const float* w, int64_t w_stride,
                int64_t w_count, float* peaks) {
  const int64_t from = static_cast<int64_t>(block_y()) * kSmallThreads + thread_index(),
                step = static_cast<int64_t>(blocks_y()) * kSmallThreads;
  float largest = 0;
  for (int64_t i = from; i < v_count; i += step)
    largest = larger(largest, v[block_x() * v_stride + i]);
  for (int64_t i = from; w && i < w_count; i += step)
    largest = larger(largest, w[block_x() * w_stride + i]);
  leave_peak(largest, peaks);
}

// δ_L = φ'(z_L) ⊙ ȳ in the slope's place [planes, tasks, count], and the largest of its values and
// of its tangents, one for each warp; blocks [tasks, slices].
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8) turn(float* ends, FM_CONSTANT Points bar, int64_t plane,
                                                int64_t count, float* peaks, float* peaks_tangent) {
  float largest = 0, largest_tangent = 0;
  for (int64_t i = static_cast<int64_t>(block_y()) * kSmallThreads + thread_index(); i < count;
       i += static_cast<int64_t>(blocks_y()) * kSmallThreads) {
    float* at = ends + block_x() * count + i;
    const float y = bar.at[0][block_x() * bar.task[0] + i];
    if constexpr (kDual) {
      const float tangent = bar.at[1] ? bar.at[1][block_x() * bar.task[1] + i] : 0.0f;
      const Dual<float> delta = Dual<float>{at[0], at[plane]} * Dual<float>{y, tangent};
      at[0] = delta.a;
      at[plane] = delta.d;
      largest = larger(largest, delta.a);
      largest_tangent = larger(largest_tangent, delta.d);
    } else {
      *at *= y;
      largest = larger(largest, *at);
    }
  }
  leave_peak(largest, peaks);
  if (kDual) leave_peak(largest_tangent, peaks_tangent);
}

// What a launch does to every parameter of every task.
enum class Move : int { kStart, kStep, kLambda, kRates, kTurn, kPull, kLeave };

FM_KERNEL void FM_BOUNDS(kSmallThreads, 8) walk(FM_CONSTANT Job job, FM_CONSTANT Room at, Move move,
                                                int64_t k, float* room, const float* gradient) {
  const int64_t P = at.parameters, blocks = (P + kSmallThreads - 1) / kSmallThreads,
                T = job.data.tasks, i = block_x() % blocks * kSmallThreads + thread_index();
  if (i >= P) return;
  const Walk own(job, at, room, block_x() / blocks);
  const float* g = gradient + own.task * P + i;
  switch (move) {
    case Move::kStart:
      own.theta(0)[i] = own.row(job.params, job.params_stride)[i];
      return;
    case Move::kStep:
      return own.step(rule_at<float>(job.rule, k), k, i, *g);
    case Move::kLambda:
      own.room[at.lambda + i] = *g * (1.0f / static_cast<float>(T));
      return;
    case Move::kRates:
      return own.add_rate(k, i);
    case Move::kTurn:
      return own.turn_back(rule_at<float>(job.rule, k), k, i);
    case Move::kPull:
      return own.pull(i, *g);
    case Move::kLeave:
      static_cast<float*>(job.theta)[own.task * P + i] = own.theta(job.steps)[i];
      return;
  }
}

// Σ λ ⊙ u_k of a task where parameters share a rate: first each warp's own, then those, in order.
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    rate_parts(FM_CONSTANT Job job, FM_CONSTANT Room at, int64_t k, float* room, float* parts) {
  const Walk own(job, at, room, block_x());
  const float *lambda = own.room + at.lambda, *u = own.room + at.updates + k * own.P;
  float sum = 0;
  for (int64_t i = static_cast<int64_t>(block_y()) * kSmallThreads + thread_index(); i < own.P;
       i += static_cast<int64_t>(blocks_y()) * kSmallThreads)
    sum = fused(lambda[i], u[i], sum);
  sum = warp_sum(sum);
  if (thread_index() % 32) return;
  parts[(own.task * blocks_y() + block_y()) * kSmallWarps + thread_index() / 32] = sum;
}
FM_KERNEL void FM_BOUNDS(kSmallThreads, 8)
    rate_sums(FM_CONSTANT Job job, FM_CONSTANT Room at, int64_t k, float* room, const float* parts,
              int64_t count) {
  const int64_t task = static_cast<int64_t>(block_x()) * kSmallThreads + thread_index();
  if (task >= job.data.tasks) return;
  const Walk own(job, at, room, task);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += parts[task * count + i];
  bool fresh;
  float* to = own.rates(k, fresh);
  *to = (fresh ? 0.0f : *to) - sum;
}

}  // namespace fastmeta
