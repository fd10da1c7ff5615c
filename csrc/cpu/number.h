// Arrays of plain or dual numbers: planes of values and of tangents, read and written a pack at a
// time.
#pragma once

#include "../math/dual.h"
#include "arena.h"
#include "pack.h"

namespace fastmeta {
namespace FM_ISA {

FM_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FM_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FM_HOST_DEVICE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct Planes {
  T* a = nullptr;  // values
  T* d = nullptr;  // tangents; null where there are none
  FM_HOST_DEVICE Planes at(int64_t i) const { return {a + i, d ? d + i : nullptr}; }
};

// kDual ? Dual<S> : S
template <class S, bool kDual>
struct NumberType {
  using type = S;
};
template <class S>
struct NumberType<S, true> {
  using type = Dual<S>;
};
template <class S, bool kDual>
using Number = typename NumberType<S, kDual>::type;

template <bool kDual, class T>
FM_HOST_DEVICE Number<Pack<T>, kDual> get(const Planes<T>& p, int64_t i) {
  if constexpr (kDual) {
    return {load(p.a + i), load(p.d + i)};
  } else {
    return load(p.a + i);
  }
}
template <class T>
FM_HOST_DEVICE void put(const Planes<T>& p, int64_t i, Pack<T> x) {
  store(p.a + i, x);
}
template <class T>
FM_HOST_DEVICE void put(const Planes<T>& p, int64_t i, Dual<Pack<T>> x) {
  store(p.a + i, x.a);
  store(p.d + i, x.d);
}

template <bool kDual, class T>
FM_HOST_DEVICE Number<T, kDual> get_one(const Planes<T>& p, int64_t i) {
  if constexpr (kDual) {
    return {p.a[i], p.d[i]};
  } else {
    return p.a[i];
  }
}
template <class T>
FM_HOST_DEVICE void put_one(const Planes<T>& p, int64_t i, T x) {
  p.a[i] = x;
}
template <class T>
FM_HOST_DEVICE void put_one(const Planes<T>& p, int64_t i, Dual<T> x) {
  p.a[i] = x.a;
  p.d[i] = x.d;
}

// Memory is planned by one function that runs twice: over a null base to count, then over the real
// one.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    if (base) FM_OPEN_MEMORY(p, bytes);
    used += (bytes + 63) / 64 * 64 + kRedZone;
    return p;
  }
  template <class T>
  Planes<T> planes(int64_t count, bool dual) {
    T* a = take<T>(count);
    return {a, dual ? take<T>(count) : nullptr};
  }
};

}  // namespace FM_ISA
}  // namespace fastmeta
