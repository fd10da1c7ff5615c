// Compositing of whole rays: exponentials a pack at a time over all samples, the scans sample by
// sample.
//
// The formula is in math/composite.h. Everything lies in thin arrays, one number per sample; a
// ray's samples follow each other.
#pragma once

#include <initializer_list>

#include "../abi.h"
#include "../math/composite.h"
#include "number.h"

namespace fastmeta {
namespace FM_ISA {

template <class T>
struct RayArrays {
  Planes<T> t, delta;                    // positions, intervals
  Planes<T> colour[3], colour_slope[3];  // c, c(1−c)
  Planes<T> density, density_slope, e, alpha, f;
  Planes<T> reached, weight;  // T, w
  Planes<T> bar[3];           // r̄gb, one per ray
  T* mask;
};

template <class T>
void carve_rays(Carver& c, int64_t capacity, bool dual, RayArrays<T>& r) {
  for (Planes<T>* p : {&r.t, &r.delta, &r.colour[0], &r.colour[1], &r.colour[2], &r.colour_slope[0],
                       &r.colour_slope[1], &r.colour_slope[2], &r.density, &r.density_slope, &r.e,
                       &r.alpha, &r.f, &r.reached, &r.weight, &r.bar[0], &r.bar[1], &r.bar[2]})
    *p = c.planes<T>(capacity, dual);
  r.mask = c.take<T>(capacity);
}

// What a ray shows, or its adjoint.
template <class S>
struct Shown {
  S rgb[3], depth, acc;
};

// δ_i = t_{i+1} − t_i, the last one a constant.
template <class T, bool kDual>
void ray_intervals(const RayArrays<T>& r, int64_t rays, const March& march) {
  const int64_t S = march.samples;
  for (int64_t i = 0; i < rays * S; ++i) {
    const bool last = i % S == S - 1;
    r.delta.a[i] = last ? static_cast<T>(march.last_interval) : r.t.a[i + 1] - r.t.a[i];
    if constexpr (kDual) r.delta.d[i] = last ? T(0) : r.t.d[i + 1] - r.t.d[i];
  }
}

// raw: four thin arrays, ld apart.
template <class T, bool kDual>
__attribute__((noinline)) void ray_samples(const RayArrays<T>& r, int64_t count, Planes<T> raw,
                                           int64_t ld, bool softplus) {
  using N = Number<Pack<T>, kDual>;
  for (int64_t i = 0; i < count; i += Pack<T>::kLanes) {
    N value, slope;
    for (int c = 0; c < 3; ++c) {
      activate<Activation::k_sigmoid>(get<kDual>(raw, c * ld + i), Pack<T>(T(1)), value, slope);
      put(r.colour[c], i, value);
      put(r.colour_slope[c], i, slope);
    }
    density_terms(softplus, get<kDual>(raw, 3 * ld + i), value, slope);
    put(r.density, i, value);
    put(r.density_slope, i, slope);
    N e, alpha, f;
    Pack<T> mask;
    interval_terms(value, get<kDual>(r.delta, i), e, alpha, f, mask);
    put(r.e, i, e);
    put(r.alpha, i, alpha);
    put(r.f, i, f);
    store(r.mask + i, mask);
  }
}

// raw and t -> what each ray shows.
template <class T, bool kDual, class Out>
void march_forward(const RayArrays<T>& r, int64_t rays, Planes<T> raw, int64_t ld,
                   const March& march, Out&& out) {
  using N = Number<T, kDual>;
  const int64_t S = march.samples;
  ray_intervals<T, kDual>(r, rays, march);
  ray_samples<T, kDual>(r, rays * S, raw, ld, march.softplus != 0);
  for (int64_t ray = 0; ray < rays; ++ray) {
    N reached{};
    if constexpr (kDual)
      reached.a = T(1);
    else
      reached = T(1);
    Shown<N> shown{};
    for (int64_t i = ray * S; i < (ray + 1) * S; ++i) {
      const N w = reached * get_one<kDual>(r.alpha, i);
      put_one(r.reached, i, reached);
      put_one(r.weight, i, w);
      for (int c = 0; c < 3; ++c) shown.rgb[c] = shown.rgb[c] + w * get_one<kDual>(r.colour[c], i);
      shown.depth = shown.depth + w * get_one<kDual>(r.t, i);
      shown.acc = shown.acc + w;
      reached = reached * get_one<kDual>(r.f, i);
    }
    if (march.white)
      for (int c = 0; c < 3; ++c) shown.rgb[c] = shown.rgb[c] + (-shown.acc + T(1));
    out(ray, shown);
  }
}

// Adjoints of what each ray shows -> r̄aw over raw, and t̄ over t where it is wanted.
template <class T, bool kDual, class In>
void march_backward(const RayArrays<T>& r, int64_t rays, Planes<T> raw, int64_t ld,
                    const March& march, bool want_t, In&& in) {
  using N = Number<T, kDual>;
  const int64_t S = march.samples;
  const T white = march.white ? T(1) : T(0);
  for (int64_t ray = 0; ray < rays; ++ray) {
    const Shown<N> bar = in(ray);
    N G{};
    for (int64_t i = (ray + 1) * S - 1; i >= ray * S; --i) {
      const N w = get_one<kDual>(r.weight, i);
      N gw = bar.depth * get_one<kDual>(r.t, i) + bar.acc;
      for (int c = 0; c < 3; ++c) {
        gw = gw + bar.rgb[c] * (get_one<kDual>(r.colour[c], i) - white);
        put_one(raw, c * ld + i, get_one<kDual>(r.colour_slope[c], i) * (w * bar.rgb[c]));
      }
      const N k = march_back(G, gw, get_one<kDual>(r.alpha, i), get_one<kDual>(r.f, i), r.mask[i]);
      const N gtau = get_one<kDual>(r.reached, i) * get_one<kDual>(r.e, i) * k;
      put_one(raw, 3 * ld + i,
              get_one<kDual>(r.density_slope, i) * (get_one<kDual>(r.delta, i) * gtau));
      if (!want_t) continue;
      const bool last = i == (ray + 1) * S - 1;
      const N gdelta = last ? N{} : get_one<kDual>(r.density, i) * gtau;
      // t̄_i = d̄epth w + δ̄_{i−1} − δ̄_i: the middle term is added when i − 1 is reached
      put_one(r.t, i, bar.depth * w - gdelta);
      if (!last) put_one(r.t, i + 1, get_one<kDual>(r.t, i + 1) + gdelta);
    }
  }
}

}  // namespace FM_ISA
}  // namespace fastmeta
