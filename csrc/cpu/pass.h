// One pass over the points of one task: its tiles, shared out to a crew of threads; loss, gradient,
// tangent.
//
// A crew of one thread owns a task alone; larger crews split a task's tiles into contiguous ranges,
// every hand with its own accumulator, which are added up in the order of the hands: the same bits
// for the same number of threads.
#pragma once

#include <sched.h>

#include "../math/philox.h"
#include "../math/project.h"
#include "rays.h"
#include "tile.h"

namespace fastmeta {
namespace FM_ISA {

// Meets all hands of a crew: counts arrivals, the last one opens the next phase.
struct Gate {
  int arrived = 0, phase = 0;
  char pad[56];

  void meet(int size) {
    if (size == 1) return;
    const int now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
    } else {
      for (int spins = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; ++spins) {
        if (spins > 2000) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }
};

// How the units (points or rays) of a data set are cut into tiles.
struct Grid {
  const Data* data = nullptr;
  int64_t group = 1;  // points per unit: a ray's samples
  int64_t tile = 1;   // units per tile
  int64_t tiles = 0;  // of the largest task

  int64_t units(int64_t task) const {
    return data->per_step ? data->per_step : data->counts ? data->counts[task] : data->points;
  }
  int64_t tiles_of(int64_t task) const { return ceil_div(units(task), tile); }
};

inline __attribute__((always_inline)) Grid make_grid(const Data& d, int64_t target, int64_t lanes,
                                                     int64_t crew) {
  Grid g;
  g.data = &d;
  g.group = d.measure == Measure::k_march ? d.march.samples : 1;
  int64_t units = 0;
  for (int64_t t = 0; t < d.tasks; ++t) units = most(units, g.units(t));
  int64_t tiles = ceil_div(units, most(1, target / g.group));
  tiles = least(units, ceil_div(tiles, crew) * crew);
  g.tile = ceil_div(units, tiles);
  if (g.group == 1) g.tile = ceil_div(g.tile, lanes) * lanes;
  g.tiles = ceil_div(units, g.tile);
  return g;
}

// A thread's own memory.
template <class T>
struct Hand {
  Tile<T> tile;
  RayArrays<T> rays;
  T *grad, *grad_d;  // accumulators
  bool filled;       // whether the last pass gave this hand a tile
  double loss;
  T* row;             // the first layer's gradient, turned
  T *sum, *rate_sum;  // over this thread's tasks: of meta-gradients, of rate gradients
};

// What the threads of one crew share: a task in flight.
template <class T>
struct Shared {
  Gate gate;
  T *packed, *packed_v;     // weights and their tangent
  const void* packed_from;  // the shared parameters that `packed` holds, or null
  T *theta, *state[2], *updates, *lambda, *direction;
  Planes<T> image, line;  // a projection's image [W²] and adjoint, and its sinogram's adjoint [A W]
  T *kept, *temporary;    // kept tiles, see Store
};

template <class T>
struct Crew {
  Shared<T>* shared;
  Hand<T>* hands;  // of the crew, in order
  int size, rank;

  Hand<T>& hand() const { return hands[rank]; }
  void meet() const { shared->gate.meet(size); }
  int64_t begin(int64_t count) const { return count * rank / size; }
  int64_t end(int64_t count) const { return count * (rank + 1) / size; }
};

// Kept tiles: `slots` of (z, h̄), numbered step by step and tile by tile; for projections, whose
// loss needs every pixel before the way back, also one (z, ż) per tile for as long as the pass
// lasts.
struct Store {
  int64_t slots = 0, slot_size = 0, temporaries = 0, temporary_size = 0;
};

// A pass: which task and step, on which data, and what is wanted.
template <class T>
struct Pass {
  const Grid* grid;
  const Store* store;
  int64_t task, step;
  bool want_grad, want_tangent;
  int64_t slot = -1;      // of this step's first tile; −1: no tile is kept
  Keep keep = Keep::kNo;  // whether this pass stores the slots or loads them
  const T *gy = nullptr,
          *w = nullptr;  // [N, C], [N, in]: given adjoint and coordinates' tangent of this task
  T *y = nullptr, *gx = nullptr;  // [N, C], [N, in]: where this task's y (or ẏ) and x̄ (or x̄̇) go
};

// Loading ---

// [n][few] -> thin arrays, the last vector filled up with zeros.
template <class T, int kFew>
void to_thin(const T* source, int64_t n, int64_t few, int64_t ld, T* to) {
  const int64_t columns = kFew ? kFew : few;
  for (int64_t c = 0; c < columns; ++c) {
    T* line = to + c * ld;
    for (int64_t i = 0; i < n; ++i) line[i] = source[i * columns + c];
    for (int64_t i = n; i < ceil_div(n, Pack<T>::kLanes) * Pack<T>::kLanes; ++i) line[i] = 0;
  }
}
template <class T>
void to_thin(const T* source, int64_t n, int64_t few, int64_t ld, T* to) {
  switch (few) {
    case 1:
      return to_thin<T, 1>(source, n, few, ld, to);
    case 2:
      return to_thin<T, 2>(source, n, few, ld, to);
    case 3:
      return to_thin<T, 3>(source, n, few, ld, to);
    case 4:
      return to_thin<T, 4>(source, n, few, ld, to);
    default:
      return to_thin<T, 0>(source, n, few, ld, to);
  }
}
template <class T>
void from_thin(const T* source, int64_t n, int64_t few, int64_t ld, T* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < few; ++c) to[i * few + c] = source[c * ld + i];
}

// The index of a unit: itself, or drawn from the first `upper`.
inline __attribute__((always_inline)) int64_t unit_index(const Data& d, int64_t task, int64_t step,
                                                         int64_t unit) {
  if (!d.per_step) return unit;
  const int64_t upper = d.counts ? d.counts[task] : d.points;
  return draw_integer(d.seed[task], static_cast<uint32_t>(unit), static_cast<uint32_t>(step),
                      kPoints, static_cast<uint32_t>(upper));
}

template <class T>
void load_points(const Pass<T>& pass, Tile<T>& t, int64_t first, int64_t units) {
  const Data& d = *pass.grid->data;
  const int64_t in = t.plan->net.in, out = t.plan->net.out;
  const T* x = static_cast<const T*>(d.x) + pass.task * d.x_stride;
  const T* y = d.y && d.measure == Measure::k_none
                   ? static_cast<const T*>(d.y) + pass.task * d.points * out
                   : nullptr;
  t.n = units;
  if (!d.per_step) {
    to_thin(x + first * in, units, in, t.capacity, t.x.a);
    if (y) to_thin(y + first * out, units, out, t.capacity, t.target.a);
    if (t.x_moves) to_thin(pass.w + first * in, units, in, t.capacity, t.x.d);
    return;
  }
  for (int64_t i = 0; i < units; ++i) {
    const int64_t k = unit_index(d, pass.task, pass.step, first + i);
    for (int64_t c = 0; c < in; ++c) t.x.a[c * t.capacity + i] = x[k * in + c];
    for (int64_t c = 0; c < out; ++c) t.target.a[c * t.capacity + i] = y[k * out + c];
  }
}

// Points o + t d of whole rays; t = linspace(near, far, S), plus jitter where there is a seed.
template <class T>
void load_rays(const Pass<T>& pass, Tile<T>& t, RayArrays<T>& r, int64_t first, int64_t rays) {
  const Data& d = *pass.grid->data;
  const int64_t S = d.march.samples, task = pass.task;
  const T near = static_cast<const T*>(d.near)[task], far = static_cast<const T*>(d.far)[task];
  const T range = far - near, jitter = range / static_cast<T>(S);
  t.n = rays * S;
  for (int64_t ray = 0; ray < rays; ++ray) {
    const int64_t k = task * d.points + unit_index(d, task, pass.step, first + ray);
    const T *o = static_cast<const T*>(d.origins) + k * 3,
            *v = static_cast<const T*>(d.directions) + k * 3;
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = ray * S + s;
      T at = near + range * (static_cast<T>(s) / static_cast<T>(S - 1));
      if (d.seed)
        at += jitter * static_cast<T>(draw_uniform(d.seed[task],
                                                   static_cast<uint32_t>((first + ray) * S + s),
                                                   static_cast<uint32_t>(pass.step), kJitter));
      r.t.a[i] = at;
      if (r.t.d) r.t.d[i] = 0;
      for (int64_t c = 0; c < 3; ++c) t.x.a[c * t.capacity + i] = o[c] + at * v[c];
    }
    for (int64_t c = 0; c < 3; ++c)
      t.target.a[c * t.capacity + ray] = static_cast<const T*>(d.y)[k * 3 + c];
  }
}

// Losses: t.y becomes ȳ; the tile's sum of ℓ ---

template <class T>
T clamp_of(const Data& d) {
  return d.clamp > 0 ? static_cast<T>(d.clamp) : static_cast<T>(INFINITY);
}

template <class T, bool kDual>
__attribute__((noinline)) double point_loss(const Data& d, Tile<T>& t, int64_t numbers) {
  const Pack<T> scale(T(1) / static_cast<T>(numbers)), clamp(clamp_of<T>(d));
  double total = 0;
  for (int64_t c = 0; c < t.plan->net.out; ++c) {
    Pack<T> ells(T(0));
    for (int64_t n = 0; n < t.n; n += Pack<T>::kLanes) {
      const int64_t i = c * t.capacity + n;
      Pack<T> ell;
      Number<Pack<T>, kDual> slope;
      loss_terms(d.loss, clamp, get<kDual>(t.y, i), load(t.target.a + i), ell, slope);
      put(t.y, i, slope * scale);
      ells = ells + select(below<T>(t.n - n), ell, Pack<T>(T(0)));
    }
    total += sum(ells);
  }
  return total;
}

template <class T, bool kDual>
__attribute__((noinline)) double ray_loss(const Data& d, Tile<T>& t, RayArrays<T>& r, int64_t rays,
                                          int64_t numbers, bool back) {
  using N = Number<T, kDual>;
  const T scale = T(1) / static_cast<T>(numbers), clamp = clamp_of<T>(d);
  double total = 0;
  march_forward<T, kDual>(
      r, rays, t.y, t.capacity, d.march, [&](int64_t ray, const Shown<N>& shown) {
        for (int c = 0; c < 3; ++c) {
          T ell;
          N slope;
          loss_terms(d.loss, clamp, shown.rgb[c], t.target.a[c * t.capacity + ray], ell, slope);
          put_one(r.bar[c], ray, slope * scale);
          total += ell;
        }
      });
  if (back)
    march_backward<T, kDual>(r, rays, t.y, t.capacity, d.march, false, [&](int64_t ray) {
      return Shown<N>{{get_one<kDual>(r.bar[0], ray), get_one<kDual>(r.bar[1], ray),
                       get_one<kDual>(r.bar[2], ray)},
                      N{},
                      N{}};
    });
  return total;
}

// The pass ---

template <class T>
Kept<T> kept_at(const Shared<T>& s, const Tile<T>& t, const Store& store, const Pass<T>& pass,
                int64_t tile) {
  Kept<T> k;
  const int64_t slot = pass.slot + tile;
  if (pass.slot < 0 || slot >= store.slots) return k;
  k.z = s.kept + slot * store.slot_size;
  k.hbar = k.z + t.plan->kept_z * t.capacity;
  k.z_mode = k.h_mode = pass.keep;
  return k;
}

// Tiles of points or rays, whose loss needs nothing beyond the tile.
template <class T, bool kDual>
void tile_pass(const Crew<T>& crew, const Pass<T>& pass) {
  Hand<T>& hand = crew.hand();
  Tile<T>& t = hand.tile;
  const Grid& grid = *pass.grid;
  const Data& d = *grid.data;
  const int64_t units = grid.units(pass.task), tiles = grid.tiles_of(pass.task),
                out = t.plan->net.out;
  const bool march = d.measure == Measure::k_march, back = pass.want_grad || pass.want_tangent;
  const int64_t numbers = units * (march ? 3 : out);
  for (int64_t tile = crew.begin(tiles); tile < crew.end(tiles); ++tile) {
    const int64_t first = tile * grid.tile, count = least(grid.tile, units - first);
    if (march) {
      load_rays(pass, t, hand.rays, first, count);
    } else {
      load_points(pass, t, first, count);
    }
    t.kept = kept_at(*crew.shared, t, *pass.store, pass, tile);
    if (back) {
      forward<T, kDual>(t);
    } else {
      forward<T, kDual, false>(t);
    }
    if (march) {
      hand.loss += ray_loss<T, kDual>(d, t, hand.rays, count, numbers, back) / numbers;
    } else if (d.y) {
      hand.loss += point_loss<T, kDual>(d, t, numbers) / numbers;
    } else {
      if (pass.y) from_thin(kDual ? t.y.d : t.y.a, count, out, t.capacity, pass.y + first * out);
      if (!pass.gy) continue;
      to_thin(pass.gy + first * out, count, out, t.capacity, t.y.a);
      if constexpr (kDual)
        for (int64_t i = 0; i < out * t.capacity; ++i) t.y.d[i] = 0;
    }
    if (!back) continue;
    backward<T, kDual>(t);
    t.fresh = false;
    if (pass.gx)
      from_thin(kDual ? t.gx.d : t.gx.a, count, t.plan->net.in, t.capacity,
                pass.gx + first * t.plan->net.in);
  }
}

// A projection: the whole image, its sinogram and loss, the image's adjoint, and the tiles again on
// the way back.
template <class T, bool kDual>
void project_pass(const Crew<T>& crew, const Pass<T>& pass) {
  Hand<T>& hand = crew.hand();
  Tile<T>& t = hand.tile;
  Shared<T>& shared = *crew.shared;
  const Grid& grid = *pass.grid;
  const Data& d = *grid.data;
  const int64_t pixels = d.size * d.size, tiles = grid.tiles_of(pass.task),
                numbers = d.angles * d.size;
  const bool back = pass.want_grad || pass.want_tangent;
  // z and ż of a tile go to its slot where there is one, else to its temporary, else they are
  // computed again
  const auto kept = [&](int64_t tile, bool again) {
    Kept<T> k = kept_at(shared, t, *pass.store, pass, tile);
    const bool slot = k.z_mode != Keep::kNo, temporary = tile < pass.store->temporaries;
    T* at = shared.temporary + tile * pass.store->temporary_size;
    const Keep now = again ? Keep::kLoad : Keep::kStore;
    if (!slot && temporary) k.z = at;
    if (again || !slot) k.z_mode = slot || temporary ? now : Keep::kNo;
    if (kDual && temporary) {
      k.zd = at + t.plan->kept_z * t.capacity;
      k.zd_mode = now;
    }
    return k;
  };
  for (int64_t tile = crew.begin(tiles); tile < crew.end(tiles); ++tile) {
    const int64_t first = tile * grid.tile, count = least(grid.tile, pixels - first);
    load_points(pass, t, first, count);
    t.kept = back ? kept(tile, false) : Kept<T>{};
    forward<T, kDual, false>(t);
    for (int64_t i = 0; i < count; ++i) {
      shared.image.a[first + i] = t.y.a[i];
      if constexpr (kDual) shared.image.d[first + i] = t.y.d[i];
    }
  }
  crew.meet();
  const T scale = T(1) / static_cast<T>(numbers), clamp = clamp_of<T>(d);
  const int32_t* index = d.pixels + pass.task * d.angles * pixels;
  for (int64_t a = crew.begin(d.angles); a < crew.end(d.angles); ++a) {
    const Planes<T> line = shared.line.at(a * d.size);
    project_angle(shared.image.a, index + a * pixels, d.size, line.a);
    if constexpr (kDual) project_angle(shared.image.d, index + a * pixels, d.size, line.d);
    const T* target = static_cast<const T*>(d.y) + (pass.task * d.angles + a) * d.size;
    for (int64_t c = 0; c < d.size; ++c) {
      T ell;
      Number<T, kDual> slope;
      loss_terms(d.loss, clamp, get_one<kDual>(line, c), target[c], ell, slope);
      put_one(line, c, slope * scale);
      hand.loss += ell / numbers;
    }
  }
  crew.meet();
  if (!back) return;
  const int64_t begin = crew.begin(pixels), end = crew.end(pixels);
  const auto adjoint = [&](T* image, const T* lines) {
    for (int64_t i = begin; i < end; ++i) image[i] = 0;
    for (int64_t a = 0; a < d.angles; ++a)
      project_angle_adjoint(lines + a * d.size, index + a * pixels, d.size, begin, end, image);
  };
  adjoint(shared.image.a, shared.line.a);
  if constexpr (kDual) adjoint(shared.image.d, shared.line.d);
  crew.meet();
  for (int64_t tile = crew.begin(tiles); tile < crew.end(tiles); ++tile) {
    const int64_t first = tile * grid.tile, count = least(grid.tile, pixels - first);
    load_points(pass, t, first, count);
    t.kept = kept(tile, true);
    forward<T, kDual>(t);
    to_thin(shared.image.a + first, count, 1, t.capacity, t.y.a);
    if constexpr (kDual) to_thin(shared.image.d + first, count, 1, t.capacity, t.y.d);
    backward<T, kDual>(t);
    t.fresh = false;
  }
}

// Runs a pass; afterwards every hand of the crew may read all accumulators and losses.
template <class T, bool kDual>
void run_pass(const Crew<T>& crew, const T* weights, const T* tangents, const Pass<T>& pass) {
  Hand<T>& hand = crew.hand();
  Tile<T>& t = hand.tile;
  t.weights = weights;
  t.tangents = tangents;
  t.grad = pass.want_grad ? hand.grad : nullptr;
  t.grad_d = pass.want_tangent ? hand.grad_d : nullptr;
  t.fresh = true;
  hand.loss = 0;
  if (pass.grid->data->measure == Measure::k_project) {
    project_pass<T, kDual>(crew, pass);
  } else {
    tile_pass<T, kDual>(crew, pass);
  }
  hand.filled = !t.fresh;
  crew.meet();
}

// Loss of the pass that has just run: the hands' shares in order.
template <class T>
T loss_of(const Crew<T>& crew) {
  double total = 0;
  for (int i = 0; i < crew.size; ++i) total += crew.hands[i].loss;
  return static_cast<T>(total);
}

// Units of work on parameters: W neurons of a layer, with their weights and biases. Each belongs to
// one hand, which adds up their gradients, updates and packs them.
template <class T, class F>
void each_unit(const Crew<T>& crew, const Plan<T>& p, F&& f) {
  for (int64_t l = 0; l < p.depth; ++l) {
    const Layer& y = p.layers[l];
    for (int64_t b = 0; b < blocks_of<T>(y.out); ++b) {
      const int64_t first = b * kWidth<T>;
      if ((y.weight + first * y.in) * crew.size / p.params == crew.rank) f(y, b);
    }
  }
}

// Calls f(offset, count) for the two natural ranges of a unit: weights and biases.
template <class T, class F>
void each_range(const Layer& y, int64_t block, F&& f) {
  const int64_t first = block * kWidth<T>, rows = lanes_of<T>(y.out, block);
  f(y.weight + first * y.in, rows * y.in);
  f(y.bias + first, rows);
}

// Adds the hands' accumulators of a unit up in their order, into the first one that holds anything,
// which it returns.
template <class T>
const T* sum_unit(const Crew<T>& crew, const Layer& y, int64_t block, T* Hand<T>::*which) {
  constexpr int W = kWidth<T>;
  int first = 0;
  while (!crew.hands[first].filled) ++first;  // every task has a tile
  T* total = crew.hands[first].*which;
  const auto add = [&](const T* part, int64_t at, int64_t count) {
    for (int64_t i = at; i < at + count; ++i) total[i] += part[i];
  };
  for (int h = first + 1; h < crew.size; ++h) {
    if (!crew.hands[h].filled) continue;
    const T* part = crew.hands[h].*which;
    if (y.thin_in) {
      add(part, y.grad + block * y.in * W, y.in * W);
    } else {
      for (int64_t b = 0; b < blocks_of<T>(y.in); ++b)
        add(part, y.grad + (b * y.out + block * W) * W, lanes_of<T>(y.out, block) * W);
    }
    add(part, y.grad_bias + block * W, lanes_of<T>(y.out, block));
  }
  return total;
}

// Calls f(offset, count, gradient) for dense pieces of a unit's natural parameters, the gradient
// summed over the crew.
template <class T, class F>
void each_piece(const Crew<T>& crew, const Layer& y, int64_t block, T* Hand<T>::*which, F&& f) {
  constexpr int W = kWidth<T>;
  const T* total = sum_unit(crew, y, block, which);
  const int64_t first = block * W, rows = lanes_of<T>(y.out, block);
  if (y.thin_in) {
    T* turned = crew.hand().row;
    for (int64_t o = 0; o < rows; ++o)
      for (int64_t i = 0; i < y.in; ++i)
        turned[o * y.in + i] = total[y.grad + (block * y.in + i) * W + o];
    f(y.weight + first * y.in, rows * y.in, turned);
  } else if (y.in == W) {  // the accumulator lies as the parameters do
    f(y.weight + first * W, rows * W, total + y.grad + first * W);
  } else {
    for (int64_t o = first; o < first + rows; ++o)
      for (int64_t b = 0; b < blocks_of<T>(y.in); ++b)
        f(y.weight + o * y.in + b * W, lanes_of<T>(y.in, b), total + y.grad + (b * y.out + o) * W);
  }
  f(y.bias + first, rows, total + y.grad_bias + first);
}

}  // namespace FM_ISA
}  // namespace fastmeta
