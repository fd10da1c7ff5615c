// Before a network its points, behind it the loss and its adjoint, as small kernels over device
// memory; and compositing and the projector alone.
//
//   points   x_i = points[k_i], k_i = i or drawn (math/philox.h)
//   rays     x = o + t d, t = linspace(near, far, S) plus jitter; rgb by compositing (ray.h)
//   pixels   sino[a,c] = (1/W) Σ_r image[k(a,r,c)], īmage[p] = (1/W) Σ_{k(a,r,c) = p} s̄ino[a,c]
//   L = (1/M) Σ ℓ(y, target), ȳ = ℓ' / M, ȳ̇ = ℓ'' ẏ / M (math/loss.h), M numbers of the task
//
// A block is four warps, with no shared memory and no barrier; blocks [tasks, parts] but for the
// projector. A thread owns a point or a sample to lay, a point's loss; a warp a ray; four lanes a
// column of a sinogram, and a pixel of its adjoint. What is drawn is drawn again where it is needed
// a second time: ten rounds of integers against a read. Sums have a fixed order, which the sizes of
// a task alone decide: a thread's own in turn, a warp's by exchange, and the warps' of a task by one
// warp of a second kernel.
//
// The adjoint of the projector gathers: the entries (a, r, c) come sorted by pixel, 4 A W W bytes a
// task and another 4 for each pixel, and a pixel adds its own. They are sorted once for a set of
// angles (fastmeta/native.py), as for the Triton worker; a counting sort in here would take the same
// memory and sort again in every pass. A sample of a ray is 16 bytes read forward, the same again
// back, from the cache, and 16 written (dual: twice); a ray keeps 4 bytes for each 32 samples.
//
// Registers on sm_90 (ptxas 13.0, dual in brackets), no spills: lay_rows 40, lay_samples 46,
// points_loss 62 (50), rays_loss 63 (101), sinogram_loss 48 (40), image_adjoint 60 (40), composite
// 48 (72), sinogram 46, sum_losses 31.
#include <cmath>

#include "../math/loss.h"
#include "../math/philox.h"
#include "../math/project.h"
#include "launch.h"
#include "measure.h"
#include "ray.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

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

// Batches ---

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

// A launch's share of a batch; points: M.
struct Share {
  int64_t step, first, points;
};

// Samples of a ray: t_i of the ray that is the unit-th of its step.
struct Times {
  float near, range, part;
  int64_t samples, seed, unit, step;
  bool jitters;

  FM_DEVICE Times(const Data& d, int64_t task, int64_t of_step, int64_t ray)
      : near(static_cast<const float*>(d.near)[task]),
        range(static_cast<const float*>(d.far)[task] - near),
        part(range / static_cast<float>(d.march.samples)),
        samples(d.march.samples),
        seed(d.seed ? d.seed[task] : 0),
        unit(ray),
        step(of_step),
        jitters(d.seed != nullptr) {}

  FM_DEVICE float operator()(int64_t i) const {
    const float even = near + range * (static_cast<float>(i) / static_cast<float>(samples - 1));
    if (!jitters) return even;
    return even + part * draw_uniform(seed, static_cast<uint32_t>(unit * samples + i),
                                      static_cast<uint32_t>(step), kJitter);
  }
};

// Points ---

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

FM_KERNEL void FM_BOUNDS(kThreads, 8)
    lay_samples(FM_CONSTANT Data d, FM_CONSTANT Share share, float* x) {
  const int64_t task = share.first + block_x(), units = units_of(d, task), S = d.march.samples;
  const float *origins = static_cast<const float*>(d.origins),
              *directions = static_cast<const float*>(d.directions);
  x += block_x() * share.points * 3;
  for (int64_t m = static_cast<int64_t>(block_y()) * kThreads + thread_index(); m < share.points;
       m += static_cast<int64_t>(blocks_y()) * kThreads) {
    const int64_t ray = static_cast<uint32_t>(m) / static_cast<uint32_t>(S);
    if (ray >= units) {
      for (int c = 0; c < 3; ++c) x[m * 3 + c] = 0.0f;
      continue;
    }
    const int64_t k = task * d.points + unit_index(d, task, share.step, ray);
    const float t = Times(d, task, share.step, ray)(m - ray * S);
    for (int c = 0; c < 3; ++c) x[m * 3 + c] = origins[k * 3 + c] + t * directions[k * 3 + c];
  }
}

// Losses ---

// A thread's share of the loss to the place of its warp: parts [blocks, warps].
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

// y [tasks, R, S, 4]; kept: what the rays keep (ray.h).
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, kDual ? 4 : 6)
    rays_loss(FM_CONSTANT Data d, FM_CONSTANT Share share, bool back, int64_t plane, float* y,
              float* kept, float* parts) {
  using Number = NumberOf<kDual>;
  const int64_t task = share.first + block_x(), units = units_of(d, task), S = d.march.samples,
                rays = most_units(d);
  const float mean = 1.0f / static_cast<float>(units * 3), clamp = clamp_of(d);
  const int lane = thread_index() % 32;
  float loss = 0;
  FM_UNROLL_1 for (int64_t ray = static_cast<int64_t>(block_y()) * kWarps + thread_index() / 32;
                   ray < rays; ray += static_cast<int64_t>(blocks_y()) * kWarps) {
    const int64_t place = block_x() * rays + ray;
    float* at = y + place * S * 4;
    if (ray >= units) {
      if (back)
        for (int64_t i = lane; i < S * 4; i += 32) write(at, plane, i, Number{});
      continue;
    }
    const Times times(d, task, share.step, ray);
    const auto raw = [&](int64_t i, int c) { return read<kDual>(at, plane, i * 4 + c); };
    const auto time = [&](int64_t i) {
      if constexpr (kDual) {
        return Dual<float>{times(i), 0.0f};
      } else {
        return times(i);
      }
    };
    const WarpRay<kDual, decltype(raw), decltype(time)> walk(d.march, raw, time,
                                                             kept + place * kept_of_ray(S, kDual));
    const Shown<Number> shown = walk.forward();
    const float* target = static_cast<const float*>(d.y) +
                          (task * d.points + unit_index(d, task, share.step, ray)) * 3;
    Shown<Number> bar = {};
    FM_UNROLL for (int c = 0; c < 3; ++c) {
      float ell;
      loss_terms(d.loss, clamp, shown.rgb[c], target[c], ell, bar.rgb[c]);
      bar.rgb[c] = bar.rgb[c] * mean;
      if (lane == c) loss = fused(ell, mean, loss);
    }
    if (back)
      walk.backward(
          bar, [&](int64_t i, int c, Number x) { write(at, plane, i * 4 + c, x); },
          [](int64_t, Number) {});
  }
  leave_loss(loss, parts);
}

// A column of 32 by the four lanes that have it modulo 8; the sum to each of them.
template <bool kDual>
FM_DEVICE NumberOf<kDual> column_sum(const float* image, int64_t plane, const int32_t* pixels,
                                     int64_t W, int64_t c) {
  using Number = NumberOf<kDual>;
  Number sum = {};
  if (c < W)
    sum = project_column<Number>(pixels, W, c, thread_index() % 32 / 8, 4,
                                 [&](int32_t k) { return read<kDual>(image, plane, k); });
  sum = sum + from_lane(sum, thread_index() % 32 ^ 8);
  sum = sum + from_lane(sum, thread_index() % 32 ^ 16);
  return sum * (1.0f / static_cast<float>(W));
}
FM_DEVICE int64_t column_of_lane() {
  return static_cast<int64_t>(block_y()) * 32 + thread_index() / 32 * 8 + thread_index() % 8;
}

// Blocks [tasks A, columns / 32]: sino of y [tasks, W W], its loss, and bar [tasks, A, W], its
// adjoint over W.
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    sinogram_loss(FM_CONSTANT Data d, FM_CONSTANT Share share, int64_t plane, const float* y,
                  int64_t bar_plane, float* bar, float* parts) {
  using Number = NumberOf<kDual>;
  const int64_t W = d.size, local = block_x() / static_cast<int>(d.angles),
                line = share.first * d.angles + block_x(), c = column_of_lane();
  const float mean = 1.0f / static_cast<float>(d.angles * W);
  const Number sino = column_sum<kDual>(y + local * W * W, plane, d.pixels + line * W * W, W, c);
  float loss = 0;
  if (c < W && thread_index() % 32 < 8) {
    float ell;
    Number slope;
    loss_terms(d.loss, clamp_of(d), sino, static_cast<const float*>(d.y)[line * W + c], ell, slope);
    loss = ell * mean;
    write(bar, bar_plane, static_cast<int64_t>(block_x()) * W + c,
          slope * (mean / static_cast<float>(W)));
  }
  leave_loss(loss, parts);
}

// A pixel of 32 by a quad of lanes; sino [A, W] of its task. The sum to each of them.
template <bool kDual>
FM_DEVICE NumberOf<kDual> pixel_sum(const float* sino, int64_t plane, const int32_t* order,
                                    const int32_t* starts, int64_t p, int64_t pixels) {
  using Number = NumberOf<kDual>;
  Number sum = {};
  if (p < pixels)
    sum = project_pixel_adjoint<Number>(order, starts[p] + thread_index() % 4, starts[p + 1], 4,
                                        [&](int32_t i) { return read<kDual>(sino, plane, i); });
  sum = sum + from_lane(sum, thread_index() % 32 ^ 1);
  return sum + from_lane(sum, thread_index() % 32 ^ 2);
}

// Blocks [tasks blocks]: image [tasks, W W] = scale Σ of bar's entries.
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    image_adjoint(const int32_t* order, const int32_t* starts, int64_t angles, int64_t W,
                  int blocks, int64_t bar_plane, const float* bar, float scale, int64_t plane,
                  float* image) {
  const int64_t task = block_x() / blocks, pixels = W * W,
                p = static_cast<int64_t>(block_x() % blocks) * (kThreads / 4) + thread_index() / 4;
  const NumberOf<kDual> sum =
      pixel_sum<kDual>(bar + task * angles * W, bar_plane, order + task * angles * pixels,
                       starts + task * (pixels + 1), p, pixels);
  if (p < pixels && thread_index() % 4 == 0) write(image, plane, task * pixels + p, sum * scale);
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

// Alone ---

template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, kDual ? 4 : 6)
    composite(FM_CONSTANT CompositeJob job, float* kept) {
  using Number = NumberOf<kDual>;
  const int64_t ray = static_cast<int64_t>(block_x()) * kWarps + thread_index() / 32,
                S = job.march.samples;
  if (ray >= job.rays) return;
  const auto number = [&](const void* a, const void* d, int64_t i) {
    if constexpr (kDual) {
      return Dual<float>{static_cast<const float*>(a)[i], static_cast<const float*>(d)[i]};
    } else {
      return static_cast<const float*>(a)[i];
    }
  };
  const auto leave = [](void* to, int64_t i, Number x) {
    if constexpr (kDual) {
      static_cast<float*>(to)[i] = x.d;
    } else {
      static_cast<float*>(to)[i] = x;
    }
  };
  const auto raw = [&](int64_t i, int c) {
    return number(job.raw, job.vraw, (ray * S + i) * 4 + c);
  };
  const auto time = [&](int64_t i) { return number(job.t, job.vt, ray * S + i); };
  const WarpRay<kDual, decltype(raw), decltype(time)> walk(job.march, raw, time,
                                                           kept + ray * kept_of_ray(S, kDual));
  const Shown<Number> shown = walk.forward();
  if (job.rgb && thread_index() % 32 == 0) {
    FM_UNROLL for (int c = 0; c < 3; ++c) leave(job.rgb, ray * 3 + c, shown.rgb[c]);
    leave(job.depth, ray, shown.depth);
    leave(job.acc, ray, shown.acc);
  }
  if (!job.graw) return;
  const auto given = [&](const void* p, int64_t i) {
    Number x = {};
    if constexpr (kDual) {
      x.a = static_cast<const float*>(p)[i];
    } else {
      x = static_cast<const float*>(p)[i];
    }
    return x;
  };
  Shown<Number> bar;
  FM_UNROLL for (int c = 0; c < 3; ++c) bar.rgb[c] = given(job.grgb, ray * 3 + c);
  bar.depth = given(job.gdepth, ray);
  bar.acc = given(job.gacc, ray);
  walk.backward(
      bar, [&](int64_t i, int c, Number x) { leave(job.graw, (ray * S + i) * 4 + c, x); },
      [&](int64_t i, Number x) { leave(job.gt, ray * S + i, x); });
}

// Blocks [T A, columns / 32].
FM_KERNEL void FM_BOUNDS(kThreads, 8) sinogram(FM_CONSTANT ProjectJob job) {
  const int64_t W = job.size, c = column_of_lane();
  const float* image = static_cast<const float*>(job.from) + block_x() / job.angles * W * W;
  const float sum = column_sum<false>(image, 0, job.pixels + block_x() * W * W, W, c);
  if (c < W && thread_index() % 32 < 8) static_cast<float*>(job.to)[block_x() * W + c] = sum;
}

// Launches ---

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Blocks that share a task's points or rays: the sizes of the data decide, not the device.
int64_t parts_of(int64_t items, int64_t a_block) {
  const int64_t parts = ceil_div(items, a_block);
  return parts < 1024 ? parts : 1024;
}

// Where what measure_loss works on lies in the room, in floats. parts: blocks of a task, each of
// which leaves four losses.
struct Place {
  int64_t parts, losses, kept, bar, size;
};

Place place_of(const Data& d, int64_t tasks, bool dual) {
  Place p = {};
  const auto take = [&](int64_t count) {
    const int64_t at = p.size;
    p.size += count;
    return at;
  };
  const bool march = d.measure == Measure::k_march, project = d.measure == Measure::k_project;
  p.parts = project ? d.angles * ceil_div(d.size, 32)
                    : parts_of(most_units(d), march ? kWarps : kThreads);
  p.losses = take(tasks * p.parts * kWarps);
  p.kept = take(march ? tasks * most_units(d) * kept_of_ray(d.march.samples, dual) : 0);
  p.bar = take(project ? tasks * d.angles * d.size * (dual ? 2 : 1) : 0);
  return p;
}

template <bool kDual>
int launch_adjoint(const int32_t* order, const int32_t* starts, int64_t tasks, int64_t angles,
                   int64_t W, const float* bar, float scale, float* image, void* stream) {
  const int blocks = static_cast<int>(ceil_div(W * W, kThreads / 4));
  return FM_LAUNCH(image_adjoint<kDual>, tasks * blocks, 1, kThreads, 0, stream, order, starts,
                   angles, W, blocks, tasks * angles * W, bar, scale, tasks * W * W, image);
}

template <bool kDual>
int measure(const Network& net, const Chunk& chunk, bool back, float* y, float* loss, float* room,
            void* stream) {
  const Data& d = *chunk.data;
  const Place at = place_of(d, chunk.tasks, kDual);
  const Share share = {chunk.step, chunk.first, network_points(d)};
  const int outputs = static_cast<int>(net.out);
  const int64_t plane = chunk.tasks * share.points * outputs;
  float *parts = room + at.losses, *bar = room + at.bar;
  int error;
  if (d.measure == Measure::k_march) {
    error = FM_LAUNCH(rays_loss<kDual>, chunk.tasks, at.parts, kThreads, 0, stream, d, share, back,
                      plane, y, room + at.kept, parts);
  } else if (d.measure == Measure::k_project) {
    error = FM_LAUNCH(sinogram_loss<kDual>, chunk.tasks * d.angles, ceil_div(d.size, 32), kThreads,
                      0, stream, d, share, plane, y, chunk.tasks * d.angles * d.size, bar, parts);
    if (!error && back)
      error = launch_adjoint<kDual>(d.order + chunk.first * d.angles * d.size * d.size,
                                    d.starts + chunk.first * (d.size * d.size + 1), chunk.tasks,
                                    d.angles, d.size, bar, 1.0f, y, stream);
  } else {
    error = FM_LAUNCH(points_loss<kDual>, chunk.tasks, at.parts, kThreads, 0, stream, d, share,
                      outputs, back, plane, y, parts);
  }
  if (error || !loss) return error;
  return FM_LAUNCH(sum_losses, ceil_div(chunk.tasks, kWarps), 1, kThreads, 0, stream, parts,
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
  const Data& d = *chunk.data;
  const Share share = {chunk.step, chunk.first, network_points(d)};
  const int64_t parts = parts_of(share.points, kThreads);
  if (d.measure == Measure::k_march)
    return FM_LAUNCH(lay_samples, chunk.tasks, parts, kThreads, 0, stream, d, share, x);
  return FM_LAUNCH(lay_rows, chunk.tasks, parts, kThreads, 0, stream, d, share,
                   static_cast<int>(net.in), x);
}

int measure_loss(const Network& net, const Chunk& chunk, bool dual, bool back, float* y,
                 float* loss, float* room, void* stream) {
  return dual ? measure<true>(net, chunk, back, y, loss, room, stream)
              : measure<false>(net, chunk, back, y, loss, room, stream);
}

int64_t room_of(const CompositeJob& job) {
  return job.rays * kept_of_ray(job.march.samples, job.vraw != nullptr);
}
int64_t room_of(const ProjectJob&) { return 0; }

int run(const CompositeJob& job, float* room, void* stream) {
  const int64_t blocks = ceil_div(job.rays, kWarps);
  if (job.vraw) return FM_LAUNCH(composite<true>, blocks, 1, kThreads, 0, stream, job, room);
  return FM_LAUNCH(composite<false>, blocks, 1, kThreads, 0, stream, job, room);
}

int run(const ProjectJob& job, float*, void* stream) {
  if (!job.adjoint)
    return FM_LAUNCH(sinogram, job.tasks * job.angles, ceil_div(job.size, 32), kThreads, 0, stream,
                     job);
  return launch_adjoint<false>(
      job.order, job.starts, job.tasks, job.angles, job.size, static_cast<const float*>(job.from),
      1.0f / static_cast<float>(job.size), static_cast<float*>(job.to), stream);
}

}  // namespace fastmeta
