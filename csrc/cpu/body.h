// The body of every instruction set's file: defines FM_TABLE, the table of this one.
#pragma once

#include "engine.h"
#include "isa.h"

namespace fastmeta {
namespace FM_ISA {

// composite alone: rays in runs of about 256 samples per thread and turn.
template <class T, bool kDual>
void composite_rays(const CompositeJob& job, RayArrays<T>& r, Planes<T> raw, int64_t ld,
                    int64_t first, int64_t rays) {
  using N = Number<T, kDual>;
  const int64_t S = job.march.samples, from = first * S, n = rays * S;
  const auto in = [&](const void* p, int64_t i) { return static_cast<const T*>(p)[i]; };
  to_thin(static_cast<const T*>(job.raw) + from * 4, n, 4, ld, raw.a);
  to_thin(static_cast<const T*>(job.t) + from, n, 1, ld, r.t.a);
  if constexpr (kDual) {
    to_thin(static_cast<const T*>(job.vraw) + from * 4, n, 4, ld, raw.d);
    to_thin(static_cast<const T*>(job.vt) + from, n, 1, ld, r.t.d);
  }
  const auto part = [](const N& x) {
    if constexpr (kDual) {
      return x.d;
    } else {
      return x;
    }
  };
  march_forward<T, kDual>(r, rays, raw, ld, job.march, [&](int64_t ray, const Shown<N>& shown) {
    if (!job.rgb) return;
    for (int c = 0; c < 3; ++c)
      static_cast<T*>(job.rgb)[(first + ray) * 3 + c] = part(shown.rgb[c]);
    static_cast<T*>(job.depth)[first + ray] = part(shown.depth);
    static_cast<T*>(job.acc)[first + ray] = part(shown.acc);
  });
  if (!job.graw) return;
  march_backward<T, kDual>(r, rays, raw, ld, job.march, true, [&](int64_t ray) {
    Shown<N> bar{};
    const auto set = [&](N& x, T value) {
      if constexpr (kDual) {
        x = {value, T(0)};
      } else {
        x = value;
      }
    };
    for (int c = 0; c < 3; ++c) set(bar.rgb[c], in(job.grgb, (first + ray) * 3 + c));
    set(bar.depth, in(job.gdepth, first + ray));
    set(bar.acc, in(job.gacc, first + ray));
    return bar;
  });
  from_thin(kDual ? raw.d : raw.a, n, 4, ld, static_cast<T*>(job.graw) + from * 4);
  from_thin(kDual ? r.t.d : r.t.a, n, 1, ld, static_cast<T*>(job.gt) + from);
}

template <class T>
void run_composite(const CompositeJob& job, Arena& arena) {
  const int64_t S = job.march.samples, turn = most(1, 256 / S),
                ld = ceil_div(turn * S, Pack<T>::kLanes) * Pack<T>::kLanes;
  const bool dual = job.vraw != nullptr;
  struct Place {
    RayArrays<T> rays;
    Planes<T> raw;
  };
  const auto carve = [&](Carver& c) {
    Place* places = c.take<Place>(job.threads);
    Place none;
    for (int i = 0; i < job.threads; ++i) {
      Place& place = c.base ? places[i] : none;
      carve_rays(c, ld, dual, place.rays);
      place.raw = c.planes<T>(4 * ld, dual);
    }
    return places;
  };
  Carver count{nullptr};
  carve(count);
  Carver real{arena.reserve(count.used)};
  Place* places = carve(real);
  const int64_t turns = ceil_div(job.rays, turn);
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t i = 0; i < turns; ++i) {
    Place& place = places[omp_get_thread_num()];
    const int64_t first = i * turn, rays = least(turn, job.rays - first);
    if (dual) {
      composite_rays<T, true>(job, place.rays, place.raw, ld, first, rays);
    } else {
      composite_rays<T, false>(job, place.rays, place.raw, ld, first, rays);
    }
  }
}

template <class T>
void run_project(const ProjectJob& job) {
  const int64_t W = job.size, pixels = W * W, A = job.angles;
  const T* from = static_cast<const T*>(job.from);
  T* to = static_cast<T*>(job.to);
  if (!job.adjoint) {
#pragma omp parallel for num_threads(job.threads) schedule(static)
    for (int64_t i = 0; i < job.tasks * A; ++i)
      project_angle(from + i / A * pixels, job.pixels + i * pixels, W, to + i * W);
    return;
  }
  const int64_t parts = ceil_div(job.threads, job.tasks);  // ranges of pixels per task
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t i = 0; i < job.tasks * parts; ++i) {
    const int64_t t = i / parts, part = i % parts, first = pixels * part / parts,
                  last = pixels * (part + 1) / parts;
    T* image = to + t * pixels;
    for (int64_t k = first; k < last; ++k) image[k] = 0;
    for (int64_t a = t * A; a < (t + 1) * A; ++a)
      project_angle_adjoint(from + a * W, job.pixels + a * pixels, W, first, last, image);
  }
}

static double multiply_adds(int64_t rounds) {
  constexpr int kChains = 12;  // two units of latency four or five
  FV x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = FV{} + 0.5f * static_cast<float>(i);
  FV a = FV{} + 0.999f, b = FV{} + 1e-3f;
  asm volatile("" : "+m"(a), "+m"(b));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + b;
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(x[i]));
  return static_cast<double>(rounds) * kChains * F::kLanes;
}

}  // namespace FM_ISA

#define FM_STRING(name) #name
#define FM_NAME_OF(name) FM_STRING(name)
const IsaTable FM_TABLE = {FM_NAME_OF(FM_ISA),
                           {FM_ISA::run_job<float>, FM_ISA::run_job<double>},
                           {FM_ISA::run_composite<float>, FM_ISA::run_composite<double>},
                           {FM_ISA::run_project<float>, FM_ISA::run_project<double>},
                           FM_ISA::multiply_adds};

}  // namespace fastmeta
