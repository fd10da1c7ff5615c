// C (+)= Σ A B for one tile: the register-blocked multiply-add kernel below every layer, forward,
// backward and dW.
//
// A kernel owns MR rows × NV vectors of C in registers (16 of 32 vector registers on AVX-512, 12 of
// 16 on AVX2) and walks k: NV vector loads of B, MR broadcasts of A, MR·NV multiply-adds. Sums run
// over k in order from 0 and are then added to C, so that a long sum over points rounds at the size
// of its tiles. Two products may follow each other into the same registers, as the dual pass needs:
// Ẇ h + W ḣ.
//
// Layouts, W = 2 vectors of lanes:
//   panel  [block of W features][point][W]: activations; a layer's weights as [block][k][W] are B
//   thin   [feature][point]: coordinates, network outputs and their adjoints, whose features are few
// Epilogues stay out of these functions: inlined behind the k loop they make GCC 12 spill the
// vectors of B, which halves the speed (tests/test_native.py reads the disassembly for it).
#pragma once

#include "pack.h"

namespace fastmeta {
namespace FM_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#elif defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif

template <class T>
constexpr int kWidth = 2 * Pack<T>::kLanes;  // W

// How A(r, k) lies in memory; ld is the distance of blocks (panel) or of features (thin), in
// elements.
enum class Order {
  kPoints,       // panel, rows are points, k features
  kFeatures,     // panel, rows are features of one block, k points
  kThinPoints,   // thin, rows are points, k features
  kThinFeatures  // thin, rows are features, k points
};
enum class Start { kZero, kBias, kAdd };  // C begins at 0, at a row of biases, or at what it holds

template <class T>
struct Product {
  const T* a;  // null: no product
  const T* b;
};

template <class T, int MR, int NV, Order kOrder>
FM_HOST_DEVICE void accumulate(typename Pack<T>::V (&c)[MR][NV], const T* a, const T* b, int64_t ld,
                               int64_t depth) {
  using V = typename Pack<T>::V;
  constexpr int W = kWidth<T>, L = Pack<T>::kLanes;
  constexpr bool kBlocked = kOrder == Order::kPoints;
  for (int64_t done = 0; done < depth; done += kBlocked ? W : depth) {
    const int64_t count = kBlocked && depth - done > W ? W : depth - done;
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k) {
      V bv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bv[j] = *reinterpret_cast<const V*>(b + j * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const T scalar = kOrder == Order::kPoints       ? a[r * W + k]
                         : kOrder == Order::kFeatures   ? a[k * W + r]
                         : kOrder == Order::kThinPoints ? a[k * ld + r]
                                                        : a[r * ld + k];
        const V av = scalar - V{};
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) c[r][j] += av * bv[j];
      }
      b += W;
    }
    if (kBlocked) a += ld;
  }
}

// `groups` times MR rows; C row r at c + r·W, the next rows of A `step` further.
template <class T, int MR, int NV, Order kOrder, Start kStart>
__attribute__((noinline)) void kernel(int64_t groups, T* c, const T* bias, Product<T> p,
                                      Product<T> q, int64_t step, int64_t ld, int64_t depth) {
  using V = typename Pack<T>::V;
  constexpr int W = kWidth<T>, L = Pack<T>::kLanes;
  for (; groups > 0; --groups, c += MR * W, p.a += step) {
    V acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j)
        acc[r][j] = kStart == Start::kBias ? *reinterpret_cast<const V*>(bias + j * L) : V{};
    accumulate<T, MR, NV, kOrder>(acc, p.a, p.b, ld, depth);
    if (q.a) {
      accumulate<T, MR, NV, kOrder>(acc, q.a, q.b, ld, depth);
      q.a += step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        V& to = *reinterpret_cast<V*>(c + r * W + j * L);
        to = kStart == Start::kAdd ? to + acc[r][j] : acc[r][j];
      }
  }
}

// rows × one block of W columns of C, NV vectors of it.
template <class T, Order kOrder, Start kStart, int NV>
void block_rows(int64_t rows, T* c, const T* bias, Product<T> p, Product<T> q, int64_t ld,
                int64_t depth) {
  constexpr int W = kWidth<T>;
  // the step of A from one row to the next
  const int64_t step = kOrder == Order::kPoints ? W : kOrder == Order::kThinFeatures ? ld : 1;
  int64_t r = 0;
  const auto run = [&](auto tag) {
    constexpr int MR = decltype(tag)::value;
    const int64_t groups = (rows - r) / MR;
    if (groups == 0) return;
    kernel<T, MR, NV, kOrder, kStart>(groups, c + r * W, bias, {p.a + r * step, p.b},
                                      {q.a ? q.a + r * step : nullptr, q.b}, MR * step, ld, depth);
    r += groups * MR;
  };
  run(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 8) run(std::integral_constant<int, 8>{});
  if constexpr (kRows > 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <class T, Order kOrder, Start kStart>
void block(int64_t rows, int64_t lanes, T* c, const T* bias, Product<T> p, Product<T> q, int64_t ld,
           int64_t depth) {
  if (lanes > Pack<T>::kLanes) {
    block_rows<T, kOrder, kStart, 2>(rows, c, bias, p, q, ld, depth);
  } else {
    block_rows<T, kOrder, kStart, 1>(rows, c, bias, p, q, ld, depth);
  }
}

}  // namespace FM_ISA
}  // namespace fastmeta
