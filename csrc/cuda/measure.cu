// Points before a network, loss and adjoint behind it, as small kernels over device memory.
//
//   x_i = points[k_i], k_i = i or drawn (math/philox.h);  L = (1/M C) Σ ℓ(y, target), ȳ = ℓ' / M C,
//   ȳ̇ = ℓ'' ẏ / M C (math/loss.h)
//
// A block is four warps with no shared memory and no barrier. What it draws it draws again instead
// of keeping it: ten rounds of integers against eight bytes. Sums have a fixed order, which the
// sizes of a task alone decide: a thread's own in turn, a warp's by exchange, and the warps' of a
// task by one warp of a second kernel.
#include <cmath>
#include <type_traits>

#include "../math/dual.h"
#include "../math/loss.h"
#include "../math/philox.h"
#include "device.h"
#include "launch.h"
#include "measure.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <bool kDual>
using NumberOf = std::conditional_t<kDual, Dual<float>, float>;

template <bool kDual>
FM_DEVICE NumberOf<kDual> read(const float* p, int64_t plane, int64_t i) {
  if constexpr (kDual) {
    return {p[i], p[plane + i]};
  } else {
    return p[i];
  }
}
FM_DEVICE void write(float* p, int64_t, int64_t i, float x) { p[i] = x; }
FM_DEVICE void write(float* p, int64_t plane, int64_t i, Dual<float> x) {
  p[i] = x.a;
  p[plane + i] = x.d;
}

FM_HOST_DEVICE int64_t most_units(const Data& d) { return d.per_step ? d.per_step : d.points; }

// Points or rays of a task, and which of its data one of them is.
FM_DEVICE int64_t units_of(const Data& d, int64_t task) {
  return d.per_step ? d.per_step : d.counts ? d.counts[task] : d.points;
}
FM_DEVICE int64_t unit_index(const Data& d, int64_t task, int64_t step, int64_t unit) {
  if (!d.per_step) return unit;
  const int64_t upper = d.counts ? d.counts[task] : d.points;
  return draw_integer(d.seed[task], static_cast<uint32_t>(unit), static_cast<uint32_t>(step),
                      kPoints, static_cast<uint32_t>(upper));
}

FM_DEVICE float clamp_of(const Data& d) {
  return d.clamp > 0 ? static_cast<float>(d.clamp) : INFINITY;
}

// A launch's share of a batch; blocks [tasks, parts].
struct Share {
  int64_t step, first, points;
};

FM_KERNEL void FM_BOUNDS(kThreads, 8)
    lay_rows(FM_CONSTANT Data d, FM_CONSTANT Share share, int inputs, float* x) {
  const int64_t task = share.first + block_x(), units = units_of(d, task);
  const float* from = static_cast<const float*>(d.x) + task * d.x_stride;
  x += block_x() * share.points * inputs;
  for (int64_t m = static_cast<int64_t>(block_y()) * kThreads + thread_index(); m < share.points;
       m += static_cast<int64_t>(blocks_y()) * kThreads) {
    const int64_t k = m < units ? unit_index(d, task, share.step, m) : 0;
    for (int i = 0; i < inputs; ++i) x[m * inputs + i] = m < units ? from[k * inputs + i] : 0.0f;
  }
}

// A thread's share of the loss to the place of its warp: parts [tasks, parts, warps].
FM_DEVICE void leave_loss(float loss, float* parts) {
  loss = warp_sum(loss);
  if (thread_index() % 32) return;
  parts[(static_cast<int64_t>(block_x()) * blocks_y() + block_y()) * kWarps + thread_index() / 32] =
      loss;
}

template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    points_loss(FM_CONSTANT Data d, FM_CONSTANT Share share, int outputs, bool back, int64_t plane,
                float* y, float* parts) {
  using Number = NumberOf<kDual>;
  const int64_t task = share.first + block_x(), units = units_of(d, task);
  const float mean = 1.0f / static_cast<float>(units * outputs), clamp = clamp_of(d);
  const float* targets = static_cast<const float*>(d.y) + task * d.points * outputs;
  y += block_x() * share.points * outputs;
  float loss = 0;
  for (int64_t m = static_cast<int64_t>(block_y()) * kThreads + thread_index(); m < share.points;
       m += static_cast<int64_t>(blocks_y()) * kThreads) {
    const bool mine = m < units;
    const int64_t k = mine ? unit_index(d, task, share.step, m) : 0;
    for (int c = 0; c < outputs; ++c) {
      Number slope = {};
      if (mine) {
        float ell;
        loss_terms(d.loss, clamp, read<kDual>(y, plane, m * outputs + c), targets[k * outputs + c],
                   ell, slope);
        loss = fused(ell, mean, loss);
      }
      if (back) write(y, plane, m * outputs + c, slope * mean);
    }
  }
  leave_loss(loss, parts);
}

// loss [tasks] = Σ of a task's parts [tasks, count], by a warp each.
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    sum_losses(const float* parts, int64_t count, int64_t tasks, float* loss) {
  const int64_t task = static_cast<int64_t>(block_x()) * kWarps + thread_index() / 32;
  float sum = 0;
  if (task < tasks)
    for (int64_t i = thread_index() % 32; i < count; i += 32) sum += parts[task * count + i];
  sum = warp_sum(sum);
  if (task < tasks && thread_index() % 32 == 0) loss[task] = sum;
}

// Blocks that share a task's points or rays: the sizes of the data decide, not the device.
int64_t parts_of(int64_t items, int64_t a_block) {
  const int64_t parts = (items + a_block - 1) / a_block;
  return parts < 1024 ? parts : 1024;
}

// Where what measure_loss works on lies in the room, in floats.
struct Place {
  int64_t parts, losses, size;
};

Place place_of(const Data& d, int64_t tasks, bool) {
  Place p = {};
  p.parts = parts_of(most_units(d), kThreads);
  p.losses = 0;
  p.size = tasks * p.parts * kWarps;
  return p;
}

template <bool kDual>
int measure(const Network& net, const Chunk& chunk, bool back, float* y, float* loss, float* room,
            void* stream) {
  const Data& d = *chunk.data;
  const Place at = place_of(d, chunk.tasks, kDual);
  const Share share = {chunk.step, chunk.first, network_points(d)};
  const int outputs = static_cast<int>(net.out);
  const int64_t plane = chunk.tasks * share.points * outputs;
  float* parts = room + at.losses;
  const int error = FM_LAUNCH(points_loss<kDual>, chunk.tasks, at.parts, kThreads, 0, stream, d,
                              share, outputs, back, plane, y, parts);
  if (error || !loss) return error;
  return FM_LAUNCH(sum_losses, (chunk.tasks + kWarps - 1) / kWarps, 1, kThreads, 0, stream, parts,
                   at.parts * kWarps, chunk.tasks, loss);
}

}  // namespace

int64_t network_points(const Data& d) {
  return most_units(d) * (d.measure == Measure::k_march ? d.march.samples : 1);
}

int64_t measure_room(const Data& data, int64_t tasks, bool dual) {
  return place_of(data, tasks, dual).size;
}

int lay_points(const Network& net, const Chunk& chunk, float* x, float*, void* stream) {
  const Share share = {chunk.step, chunk.first, network_points(*chunk.data)};
  return FM_LAUNCH(lay_rows, chunk.tasks, parts_of(share.points, kThreads), kThreads, 0, stream,
                   *chunk.data, share, static_cast<int>(net.in), x);
}

int measure_loss(const Network& net, const Chunk& chunk, bool dual, bool back, float* y,
                 float* loss, float* room, void* stream) {
  return dual ? measure<true>(net, chunk, back, y, loss, room, stream)
              : measure<false>(net, chunk, back, y, loss, room, stream);
}

}  // namespace fastmeta
