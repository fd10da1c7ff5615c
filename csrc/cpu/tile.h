// One tile of points through one network: forward, loss, backward, on plain numbers (the gradient)
// or dual numbers (with the weights' tangent v: the Hessian-vector product). Per layer
//
//   z = W h + b, h' = φ(z)          ż = Ẇ h + W ḣ + ḃ
//   δ = φ'(z) h̄                     δ̇ = φ' h̄̇ + φ'' ż h̄
//   W̄ = Σ δ hᵀ, h̄ = Wᵀ δ            W̄̇ = Σ δ̇ hᵀ + δ ḣᵀ, h̄̇ = Wᵀ δ̇ + Ẇᵀ δ
//
// A thread owns a tile: for each hidden layer panels of h and of the slope φ', which δ then
// overwrites; one block of z or h̄ stays in L1 between the multiply-add kernel and its epilogue.
// Pre-activations z, tangents ż and adjoints h̄ may be kept for a later pass over the same tile, or
// come from an earlier one (Kept).
#pragma once

#include "../math/activation.h"
#include "../math/loss.h"
#include "plan.h"

namespace fastmeta {
namespace FM_ISA {

enum class Keep { kNo, kStore, kLoad };

// What one tile keeps between passes: panels of z, ż and h̄ at Layer::kept_z and kept_h.
template <class T>
struct Kept {
  T *z = nullptr, *zd = nullptr, *hbar = nullptr;
  Keep z_mode = Keep::kNo, zd_mode = Keep::kNo, h_mode = Keep::kNo;
};

template <class T>
struct Tile {
  const Plan<T>* plan;
  int64_t capacity;                   // points, a multiple of a vector's lanes
  int64_t n;                          // points in it now
  Planes<T> x, y, slope, target, gx;  // thin: [in], [out], φ' of the output, [out], [in]
  Planes<T> h0, cosine;               // panels, where there is an encoding
  Planes<T> h[kMaxDepth], s[kMaxDepth];
  Planes<T> z;   // one block
  bool x_moves;  // the coordinates have a tangent
  const T *weights, *tangents, *fixed;
  T *grad, *grad_d;  // accumulators of the gradient and of its tangent; null: not wanted
  bool fresh;        // they hold nothing yet
  Kept<T> kept;
};

template <class T>
void carve_tile(Carver& c, const Plan<T>& p, int64_t capacity, bool dual, bool x_moves,
                Tile<T>& t) {
  t.plan = &p;
  t.capacity = capacity;
  t.x = c.planes<T>(capacity * p.net.in, x_moves);
  t.y = c.planes<T>(capacity * p.net.out, dual);
  t.slope = c.planes<T>(capacity * p.net.out, dual);
  t.target = c.planes<T>(capacity * p.net.out, false);
  t.gx = c.planes<T>(p.want_x ? capacity * p.net.in : 0, dual);
  const int64_t wide = p.encodes ? capacity * padded<T>(p.encoded) : 0;
  t.h0 = c.planes<T>(wide, x_moves || (dual && p.want_x));
  t.cosine = c.planes<T>(p.want_x ? wide : 0, x_moves);
  for (int64_t l = 0; l + 1 < p.depth; ++l) {
    t.h[l] = c.planes<T>(capacity * padded<T>(p.net.width), dual);
    t.s[l] = c.planes<T>(capacity * padded<T>(p.net.width), dual);
  }
  t.z = c.planes<T>(capacity * kWidth<T>, dual);
}

// Epilogues: out of line, so that the multiply-add kernels keep their registers ---

// Calls f(index of a pack) for the packs of one block's n rows that are in use.
template <class T, class F>
FM_HOST_DEVICE void each_pack(int64_t n, int64_t lanes, F&& f) {
  constexpr int L = Pack<T>::kLanes, W = kWidth<T>;
  if (lanes > L) {
    for (int64_t i = 0; i < n * W; i += L) f(i);
  } else {
    for (int64_t i = 0; i < n * W; i += W) f(i);
  }
}

// The scalar functions, for phases that the packs do not reach.
template <class T, bool kDual, Activation kKind, bool kSlope>
__attribute__((noinline, cold)) void activate_far(int64_t n, T w0, Planes<T> z, Planes<T> h,
                                                  Planes<T> s) {
  for (int64_t i = 0; i < n * kWidth<T>; ++i) {
    Number<T, kDual> value, slope;
    activate<kKind>(get_one<kDual>(z, i), w0, value, slope);
    put_one(h, i, value);
    if constexpr (kSlope) put_one(s, i, slope);
  }
}

template <class T, bool kDual, Activation kKind, bool kSlope>
__attribute__((noinline)) void activate_block(int64_t n, int64_t lanes, T w0, Planes<T> z,
                                              Planes<T> h, Planes<T> s) {
  constexpr bool kPhase = kKind == Activation::k_sine;
  Reach<T> reach;
  each_pack<T>(n, lanes, [&](int64_t i) {
    const auto at = get<kDual>(z, i);
    Number<Pack<T>, kDual> out, slope;
    if constexpr (kPhase) reach.see(value(at));
    activate<kKind>(at, Pack<T>(w0), out, slope);
    put(h, i, out);
    if constexpr (kSlope) put(s, i, slope);
  });
  if (kPhase && reach.beyond(static_cast<T>(kPhaseLimit / w0)))
    activate_far<T, kDual, kKind, kSlope>(n, w0, z, h, s);
}

// δ = φ' h̄ in place of φ'; b̄ += Σ δ for those that are not null. hbar.a and hbar.d may come from
// different places.
template <class T, bool kDual>
__attribute__((noinline)) void delta_block(int64_t n, int64_t lanes, Planes<T> hbar, Planes<T> s,
                                           T* bias, T* bias_d, bool fresh) {
  constexpr int L = Pack<T>::kLanes, W = kWidth<T>;
  for (int64_t first = 0; first < lanes; first += L) {
    Number<Pack<T>, kDual> total{};
    for (int64_t i = first; i < n * W; i += W) {
      const auto delta = get<kDual>(s, i) * get<kDual>(hbar, i);
      put(s, i, delta);
      total = total + delta;
    }
    const auto add = [&](T* to, Pack<T> part) {
      if (to) store(to + first, fresh ? part : part + load(to + first));
    };
    add(bias, value(total));
    if constexpr (kDual) add(bias_d, total.d);
  }
}

// Forward ---

// h_0: q in the identity columns and sin(q) in the others, q = x basis + phase. False: phases lie
// too far out for the packs, and it must run again lane by lane.
template <class T>
FM_HOST_DEVICE void sincos_lanes(Pack<T> q, Pack<T>& s, Pack<T>& c) {
  for (int i = 0; i < Pack<T>::kLanes; ++i) {
    T sine, cosine;
    fastmeta::sincos(T(q.v[i]), sine, cosine);
    s.v[i] = sine;
    c.v[i] = cosine;
  }
}

template <class T>
__attribute__((noinline)) bool encode_block(const Tile<T>& t, int64_t b, int64_t lanes, bool far) {
  constexpr int L = Pack<T>::kLanes, W = kWidth<T>;
  const Plan<T>& p = *t.plan;
  const bool moves = t.x_moves, back = p.want_x;
  Reach<T> reach;
  for (int64_t first = 0; first < lanes; first += L) {
    const int64_t column = b * W + first;
    const Mask<T> same = below<T>(p.net.identity - column);
    const T* basis = t.fixed + p.basis + b * p.net.in * W + first;
    for (int64_t n = 0; n < t.n; ++n) {
      const int64_t i = (b * t.capacity + n) * W + first;
      Pack<T> q = load(t.fixed + p.phase + column), dq(T(0));
      for (int64_t d = 0; d < p.net.in; ++d) {
        const Pack<T> f = load(basis + d * W);
        q = q + Pack<T>(t.x.a[d * t.capacity + n]) * f;
        if (moves) dq = dq + Pack<T>(t.x.d[d * t.capacity + n]) * f;
      }
      Pack<T> s, c;
      reach.see(q);
      sincos(q, s, c);
      if (__builtin_expect(far, 0)) sincos_lanes(q, s, c);
      const Pack<T> slope = select(same, Pack<T>(T(1)), c);
      store(t.h0.a + i, select(same, q, s));
      if (moves) store(t.h0.d + i, slope * dq);
      if (back) store(t.cosine.a + i, slope);
      if (back && moves) store(t.cosine.d + i, select(same, Pack<T>(T(0)), -(s * dq)));
    }
  }
  return !reach.beyond(static_cast<T>(kPhaseLimit));
}

template <class T, bool kDual, bool kSlope>
void hidden_layer(const Tile<T>& t, int64_t l) {
  const Plan<T>& p = *t.plan;
  const Layer& y = p.layers[l];
  constexpr int W = kWidth<T>;
  const int64_t ld = t.capacity * (y.thin_in ? 1 : W), block_size = t.capacity * W;
  const Planes<T> in = y.thin_in ? t.x : l ? t.h[l - 1] : t.h0;
  const bool in_moves = kDual && (l > 0 || t.x_moves), keeps = y.kept_z >= 0;
  const auto product = [&](T* z, const T* bias, Product<T> a, Product<T> b, int64_t lanes) {
    if (y.thin_in) {
      block<T, Order::kThinPoints, Start::kBias>(t.n, lanes, z, bias, a, b, ld, y.in);
    } else {
      block<T, Order::kPoints, Start::kBias>(t.n, lanes, z, bias, a, b, ld, y.in);
    }
  };
  for (int64_t b = 0; b < blocks_of<T>(y.out); ++b) {
    const int64_t lanes = lanes_of<T>(y.out, b), panel = y.forward + b * y.in * W,
                  bias = y.packed_bias + b * W;
    const int64_t slot = y.kept_z * t.capacity + b * block_size;
    Planes<T> z = t.z;
    if (keeps && t.kept.z_mode != Keep::kNo) z.a = t.kept.z + slot;
    if (keeps && t.kept.zd_mode != Keep::kNo) z.d = t.kept.zd + slot;
    if (!keeps || t.kept.z_mode != Keep::kLoad)
      product(z.a, t.weights + bias, {in.a, t.weights + panel}, {}, lanes);
    if (kDual && (!keeps || t.kept.zd_mode != Keep::kLoad))
      product(z.d, t.tangents + bias, {in.a, t.tangents + panel},
              {in_moves ? in.d : nullptr, t.weights + panel}, lanes);
    with_activation(y.activation, [&](auto tag) {
      activate_block<T, kDual, decltype(tag)::kValue, kSlope>(t.n, lanes, static_cast<T>(y.w0), z,
                                                              t.h[l].at(b * block_size),
                                                              t.s[l].at(b * block_size));
    });
  }
}

template <class T, bool kDual, Activation kKind>
__attribute__((noinline)) void output_block(const Tile<T>& t) {
  const int64_t count = ceil_div(t.n, Pack<T>::kLanes) * Pack<T>::kLanes;
  for (int64_t c = 0; c < t.plan->net.out; ++c)
    for (int64_t i = c * t.capacity; i < c * t.capacity + count; i += Pack<T>::kLanes) {
      Number<Pack<T>, kDual> value, slope;
      activate<kKind>(get<kDual>(t.y, i), Pack<T>(T(1)), value, slope);
      put(t.y, i, value + Pack<T>(t.plan->net.shift));
      put(t.slope, i, slope);
    }
}

// x in t.x -> y in t.y, and what the way back reads.
template <class T, bool kDual, bool kSlope = true>
void forward(const Tile<T>& t) {
  const Plan<T>& p = *t.plan;
  if (p.encodes)
    for (int64_t b = 0; b < blocks_of<T>(p.encoded); ++b) {
      const int64_t lanes = lanes_of<T>(p.encoded, b);
      if (!encode_block<T>(t, b, lanes, false)) encode_block<T>(t, b, lanes, true);
    }
  for (int64_t l = 0; l + 1 < p.depth; ++l) hidden_layer<T, kDual, kSlope>(t, l);
  const Layer& y = p.layers[p.depth - 1];
  const Planes<T> in = t.h[p.depth - 2];
  const int64_t ld = t.capacity * kWidth<T>;
  dots<T>(t.n, y.out, y.in, {in.a, t.weights + y.forward}, {}, t.weights + y.packed_bias, ld,
          t.capacity, t.y.a);
  if constexpr (kDual)
    dots<T>(t.n, y.out, y.in, {in.a, t.tangents + y.forward}, {in.d, t.weights + y.forward},
            t.tangents + y.packed_bias, ld, t.capacity, t.y.d);
  with_activation(hidden_twin(p.net.output),
                  [&](auto tag) { output_block<T, kDual, decltype(tag)::kValue>(t); });
}

// Backward ---

// δ of the outputs from ȳ, in place, with b̄ of the last layer.
template <class T, bool kDual>
__attribute__((noinline)) void output_delta(const Tile<T>& t) {
  constexpr int L = Pack<T>::kLanes;
  const Layer& y = t.plan->layers[t.plan->depth - 1];
  for (int64_t c = 0; c < y.out; ++c) {
    Number<Pack<T>, kDual> total{};
    for (int64_t n = 0; n < t.n; n += L) {
      const auto delta =
          get<kDual>(t.slope, c * t.capacity + n) * get<kDual>(t.y, c * t.capacity + n);
      put(t.y, c * t.capacity + n, delta);
      total = total + keep_where(below<T>(t.n - n), delta, Pack<T>(T(0)));
    }
    const auto add = [&](T* to, Pack<T> part) {
      if (to) to[y.grad_bias + c] = (t.fresh ? T(0) : to[y.grad_bias + c]) + sum(part);
    };
    add(t.grad, value(total));
    if constexpr (kDual) add(t.grad_d, total.d);
  }
}

template <class T, Order kOrder>
void add_block(bool fresh, int64_t rows, int64_t lanes, T* c, Product<T> p, Product<T> q,
               int64_t ld, int64_t n) {
  if (fresh) {
    block<T, kOrder, Start::kZero>(rows, lanes, c, nullptr, p, q, ld, n);
  } else {
    block<T, kOrder, Start::kAdd>(rows, lanes, c, nullptr, p, q, ld, n);
  }
}

// W̄ of one layer, Σ over the tile's points of a's rows times b's lanes; two products for the
// tangent.
template <class T>
void weight_gradient(const Tile<T>& t, int64_t l, T* grad, bool tangent) {
  const Plan<T>& p = *t.plan;
  const Layer& y = p.layers[l];
  constexpr int W = kWidth<T>;
  const int64_t size = t.capacity * W;
  const Planes<T> delta = y.last ? t.y : t.s[l];
  const Planes<T> in = y.thin_in ? t.x : l ? t.h[l - 1] : t.h0;
  const bool in_moves = tangent && (l > 0 || t.x_moves);
  const T* first = tangent ? delta.d : delta.a;
  T* to = grad + y.grad;
  if (y.thin_in) {  // rows: coordinates; lanes: neurons
    for (int64_t b = 0; b < blocks_of<T>(y.out); ++b)
      add_block<T, Order::kThinFeatures>(
          t.fresh, y.in, lanes_of<T>(y.out, b), to + b * y.in * W, {in.a, first + b * size},
          {in_moves ? in.d : nullptr, delta.a + b * size}, t.capacity, t.n);
    return;
  }
  for (int64_t b = 0; b < blocks_of<T>(y.in); ++b) {
    const int64_t lanes = lanes_of<T>(y.in, b);
    const T* more = in_moves ? in.d + b * size : nullptr;
    T* panel = to + b * y.out * W;
    if (y.last) {
      add_block<T, Order::kThinFeatures>(t.fresh, y.out, lanes, panel, {first, in.a + b * size},
                                         {in_moves ? delta.a : nullptr, more}, t.capacity, t.n);
      continue;
    }
    for (int64_t o = 0; o < blocks_of<T>(y.out); ++o)
      add_block<T, Order::kFeatures>(t.fresh, lanes_of<T>(y.out, o), lanes, panel + o * W * W,
                                     {first + o * size, in.a + b * size},
                                     {in_moves ? delta.a + o * size : nullptr, more}, 0, t.n);
  }
}

template <class T>
void back_block(const Tile<T>& t, const Layer& y, T* to, Product<T> p, Product<T> q,
                int64_t lanes) {
  if (y.last) {
    block<T, Order::kThinPoints, Start::kZero>(t.n, lanes, to, nullptr, p, q, t.capacity, y.out);
  } else {
    block<T, Order::kPoints, Start::kZero>(t.n, lanes, to, nullptr, p, q, t.capacity * kWidth<T>,
                                           y.out);
  }
}

// h̄_l = W_{l+1}ᵀ δ_{l+1}, then δ_l, block by block.
template <class T, bool kDual>
void hidden_back(const Tile<T>& t, int64_t l) {
  const Plan<T>& p = *t.plan;
  const Layer &y = p.layers[l], &above = p.layers[l + 1];
  constexpr int W = kWidth<T>;
  const Planes<T> delta = above.last ? t.y : t.s[l + 1];
  for (int64_t b = 0; b < blocks_of<T>(y.out); ++b) {
    const int64_t lanes = lanes_of<T>(y.out, b), size = t.capacity * W,
                  panel = above.backward + b * above.out * W;
    Planes<T> hbar = t.z;
    const Keep mode = y.kept_h >= 0 ? t.kept.h_mode : Keep::kNo;
    if (mode != Keep::kNo) hbar.a = t.kept.hbar + y.kept_h * t.capacity + b * size;
    if (mode != Keep::kLoad)
      back_block<T>(t, above, hbar.a, {delta.a, t.weights + panel}, {}, lanes);
    if constexpr (kDual)
      back_block<T>(t, above, hbar.d, {delta.d, t.weights + panel}, {delta.a, t.tangents + panel},
                    lanes);
    const int64_t bias = y.grad_bias + b * W;
    delta_block<T, kDual>(t.n, lanes, hbar, t.s[l].at(b * size), t.grad ? t.grad + bias : nullptr,
                          t.grad_d ? t.grad_d + bias : nullptr, t.fresh);
  }
}

// x̄ from δ_0: through the first layer, and through the encoding where there is one.
template <class T, bool kDual>
void coordinates_back(const Tile<T>& t) {
  const Plan<T>& p = *t.plan;
  const Layer& y = p.layers[0];
  const int64_t size = t.capacity * kWidth<T>;
  Planes<T> delta = t.s[0];
  const T *rows = t.weights + y.backward, *moved = kDual ? t.tangents + y.backward : nullptr;
  int64_t features = y.out;
  if (p.encodes) {
    for (int64_t b = 0; b < blocks_of<T>(p.encoded); ++b) {
      const int64_t lanes = lanes_of<T>(p.encoded, b), panel = y.backward + b * y.out * kWidth<T>;
      back_block<T>(t, y, t.z.a, {delta.a, t.weights + panel}, {}, lanes);
      if constexpr (kDual)
        back_block<T>(t, y, t.z.d, {delta.d, t.weights + panel}, {delta.a, t.tangents + panel},
                      lanes);
      each_pack<T>(t.n, lanes, [&](int64_t i) {  // into h_0's panels, which W̄_0 has read already
        const int64_t at = b * size + i;
        const Pack<T> c = load(t.cosine.a + at), value = load(t.z.a + i);
        store(t.h0.a + at, c * value);
        if constexpr (kDual) {
          Pack<T> tangent = c * load(t.z.d + i);
          if (t.x_moves) tangent = tangent + load(t.cosine.d + at) * value;
          store(t.h0.d + at, tangent);
        }
      });
    }
    delta = t.h0;
    rows = t.fixed + p.basis_rows;
    moved = nullptr;
    features = p.encoded;
  }
  dots<T>(t.n, p.net.in, features, {delta.a, rows}, {}, nullptr, size, t.capacity, t.gx.a);
  if constexpr (kDual)
    dots<T>(t.n, p.net.in, features, {delta.d, rows}, {moved ? delta.a : nullptr, moved}, nullptr,
            size, t.capacity, t.gx.d);
}

// ȳ in t.y -> the accumulators, and t.gx where it is wanted.
template <class T, bool kDual>
void backward(const Tile<T>& t) {
  const Plan<T>& p = *t.plan;
  output_delta<T, kDual>(t);
  for (int64_t l = p.depth - 1; l >= 0; --l) {
    if (l + 1 < p.depth) hidden_back<T, kDual>(t, l);
    if (t.grad) weight_gradient<T>(t, l, t.grad, false);
    if (kDual && t.grad_d) weight_gradient<T>(t, l, t.grad_d, true);
  }
  if (p.want_x) coordinates_back<T, kDual>(t);
}

}  // namespace FM_ISA
}  // namespace fastmeta
