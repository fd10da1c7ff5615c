// Transposes between rows and lanes, in registers.
#pragma once

#include "gemm.h"
#include "number.h"

namespace fastmeta {
namespace FM_ISA {

// Shuffle masks of one butterfly stage over vectors of L lanes, 2^kStage apart.
template <class T, int kStage, bool kHigh>
FM_HOST_DEVICE typename Pack<T>::I pair_mask() {
  constexpr int L = Pack<T>::kLanes, step = 1 << kStage;
  typename Pack<T>::I m{};
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) {
    const int u = j % (2 * step), group = j / (2 * step) * 2 * step;
    m[j] = (u < step ? group + u : L + group + u - step) + (kHigh ? step : 0);
  }
  return m;
}

// sums[i] = Σ lanes of x[i], for L vectors: L − 1 additions and twice as many shuffles.
template <class T, int kStage = 0>
FM_HOST_DEVICE typename Pack<T>::V sum_each(typename Pack<T>::V* x) {
  constexpr int L = Pack<T>::kLanes, count = L >> (kStage + 1);
  const auto low = pair_mask<T, kStage, false>(), high = pair_mask<T, kStage, true>();
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
    x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low) +
           __builtin_shuffle(x[2 * i], x[2 * i + 1], high);
  if constexpr (count > 1) return sum_each<T, kStage + 1>(x);
  return x[0];
}

// x[i][j] <- x[j][i] for L × L numbers.
template <class T, int kStage = 0>
FM_HOST_DEVICE void transpose(typename Pack<T>::V* x) {
  constexpr int L = Pack<T>::kLanes, step = 1 << kStage;
  if constexpr (step < L) {
    const auto low = pair_mask<T, kStage, false>(), high = pair_mask<T, kStage, true>();
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & step) continue;
      const auto a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + step] = __builtin_shuffle(a, b, high);
    }
    transpose<T, kStage + 1>(x);
  }
}

// to[i][r] = source[r·in + i] for `rows` <= W rows of `in` numbers; the lanes from `rows` on become
// 0.
template <class T>
void transpose_rows(const T* source, int64_t in, int64_t rows, T* to) {
  constexpr int W = kWidth<T>, L = Pack<T>::kLanes;
  int64_t i = 0;
  if (rows == W) {
    for (; i + L <= in; i += L) {
      for (int half = 0; half < 2; ++half) {
        typename Pack<T>::V x[L];
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) x[r] = load_unaligned(source + (half * L + r) * in + i).v;
        transpose<T>(x);
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) store(to + (i + r) * W + half * L, Pack<T>(x[r]));
      }
    }
  }
  for (; i < in; ++i)
    for (int64_t r = 0; r < W; ++r) to[i * W + r] = r < rows ? source[r * in + i] : T(0);
}

// A row of W lanes of which the first `lanes` are copied and the others become 0; back likewise
// without the zeros.
template <class T>
FM_HOST_DEVICE void copy_lanes(const T* source, int64_t lanes, T* to) {
  constexpr int W = kWidth<T>, L = Pack<T>::kLanes;
  if (lanes == W) {
    store(to, load_unaligned(source));
    store(to + L, load_unaligned(source + L));
  } else {
    for (int64_t i = 0; i < W; ++i) to[i] = i < lanes ? source[i] : T(0);
  }
}

// Few features: out[c][n] = bias[c] + Σ_k h[n][k] rows[c][k] (+ Σ g[n][k] more[c][k]), from panels
// onto thin arrays.
template <class T>
struct Dots {
  const T* h;     // panels of `in` features, blocks ld apart; null: no product
  const T* rows;  // [few][in, padded]
};

template <class T>
FM_HOST_DEVICE void dot_vectors(typename Pack<T>::V (&acc)[Pack<T>::kLanes], Dots<T> d, int64_t n,
                                int64_t in, int64_t ld) {
  constexpr int W = kWidth<T>, L = Pack<T>::kLanes;
  for (int64_t k = 0; k < in; k += L) {
    const T* h = d.h + k / W * ld + n * W + k % W;
    const auto weight = load(d.rows + k).v;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) acc[i] += load(h + i * W).v * weight;
  }
}

template <class T>
__attribute__((noinline)) void dots(int64_t points, int64_t few, int64_t in, Dots<T> p, Dots<T> q,
                                    const T* bias, int64_t ld, int64_t out_ld, T* out) {
  constexpr int L = Pack<T>::kLanes;
  const int64_t row = ceil_div(in, kWidth<T>) * kWidth<T>;
  for (int64_t n = 0; n < points; n += L) {
    for (int64_t c = 0; c < few; ++c) {
      typename Pack<T>::V acc[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) acc[i] = typename Pack<T>::V{};
      dot_vectors<T>(acc, {p.h, p.rows + c * row}, n, in, ld);
      if (q.h) dot_vectors<T>(acc, {q.h, q.rows + c * row}, n, in, ld);
      store(out + c * out_ld + n, Pack<T>(sum_each<T>(acc)) + Pack<T>(bias ? bias[c] : T(0)));
    }
  }
}

}  // namespace FM_ISA
}  // namespace fastmeta
