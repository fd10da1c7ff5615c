// Where everything lies: layers in the natural parameters, in packed weights and in the gradient's
// accumulators; and the tiles of points a pass is cut into.
//
// Packed weights, W features to a block: forward [out block][in][W] and backward [in block][out][W]
// are read by the multiply-add kernel as B; a layer onto few features (the last one, and the way
// back to the coordinates) is read by rows [few][in, padded]. The accumulator of dW is
// [in block][out][W]; of a first layer on coordinates [out block][in][W].
#pragma once

#include "../abi.h"
#include "number.h"
#include "shuffle.h"

namespace fastmeta {
namespace FM_ISA {

template <class T>
FM_HOST_DEVICE int64_t blocks_of(int64_t features) {
  return ceil_div(features, kWidth<T>);
}
// Features of a block that exist, and vectors they fill.
template <class T>
FM_HOST_DEVICE int64_t lanes_of(int64_t features, int64_t block) {
  return least(kWidth<T>, features - block * kWidth<T>);
}

struct Layer {
  int64_t in, out;
  int64_t weight, bias;                    // in a natural row of parameters
  int64_t forward, backward, packed_bias;  // in packed weights
  int64_t grad, grad_bias;                 // in accumulators
  Activation activation;
  double w0;
  bool thin_in, last;      // reads coordinates; writes the network's outputs
  bool back;               // the adjoint of its input is wanted
  int64_t kept_z, kept_h;  // offsets of a kept tile, in points; −1: not kept
};

template <class T>
struct Plan {
  Network net;
  int64_t depth, params, encoded;  // encoded: E, features of h_0
  bool encodes, want_x;
  Layer layers[kMaxDepth];
  int64_t packed, accumulated;  // sizes of one packed set, one accumulator
  int64_t basis, phase, basis_rows,
      fixed;               // the encoding's packed [block][in][W], [block W], [in][padded]; size
  int64_t kept_z, kept_h;  // numbers per point of what a kept tile holds: pre-activations, adjoints
};

template <class T>
int64_t padded(int64_t features) {
  return blocks_of<T>(features) * kWidth<T>;
}

template <class T>
void make_plan(Plan<T>& p, const Network& net, bool want_x) {
  p.net = net;
  p.depth = net.depth;
  p.encodes = net.encoded > 0;
  p.encoded = p.encodes ? net.encoded : net.in;
  p.want_x = want_x;
  p.params = p.packed = p.accumulated = p.kept_z = p.kept_h = 0;
  const auto grow = [](int64_t& total, int64_t count) {  // keeps every part on a vector's boundary
    const int64_t at = total;
    total += ceil_div(count, kWidth<T>) * kWidth<T>;
    return at;
  };
  for (int64_t l = 0; l < net.depth; ++l) {
    Layer& y = p.layers[l];
    y.in = l == 0 ? p.encoded : net.width;
    y.last = l == net.depth - 1;
    y.out = y.last ? net.out : net.width;
    y.thin_in = l == 0 && !p.encodes;
    y.activation = net.activation;
    y.w0 = l == 0 ? net.w0_first : net.w0;
    y.weight = p.params;
    y.bias = y.weight + y.in * y.out;
    p.params = y.bias + y.out;
    y.forward = grow(p.packed, y.last ? y.out * padded<T>(y.in) : padded<T>(y.out) * y.in);
    y.back = l > 0 || want_x;
    y.backward = grow(p.packed, !y.back     ? 0
                                : y.thin_in ? y.in * padded<T>(y.out)
                                            : padded<T>(y.in) * y.out);
    y.packed_bias = grow(p.packed, padded<T>(y.out));
    y.grad = grow(p.accumulated, y.thin_in ? padded<T>(y.out) * y.in : padded<T>(y.in) * y.out);
    y.grad_bias = grow(p.accumulated, padded<T>(y.out));
    // what a later pass over the same tile would otherwise multiply out again; layers on few
    // features are not worth it
    const bool keep_z = !y.last && !y.thin_in, keep_h = l + 2 < net.depth;
    y.kept_z = keep_z ? p.kept_z : -1;
    y.kept_h = keep_h ? p.kept_h : -1;
    p.kept_z += keep_z ? padded<T>(y.out) : 0;
    p.kept_h += keep_h ? padded<T>(y.out) : 0;
  }
  p.fixed = 0;
  p.basis = grow(p.fixed, p.encodes ? padded<T>(p.encoded) * net.in : 0);
  p.phase = grow(p.fixed, p.encodes ? padded<T>(p.encoded) : 0);
  p.basis_rows = grow(p.fixed, p.encodes && want_x ? padded<T>(p.encoded) * net.in : 0);
}

// Packing ---

// One block of W rows of a layer, from the natural row of parameters.
template <class T>
void pack_rows(const Layer& y, int64_t block, const T* params, T* packed) {
  constexpr int W = kWidth<T>;
  const int64_t first = block * W, count = lanes_of<T>(y.out, block);
  const T* source = params + y.weight + first * y.in;
  const int64_t in_pad = padded<T>(y.in), out_pad = padded<T>(y.out);
  T* to = packed + y.forward + (y.last ? first * in_pad : first * y.in);
  if (y.last) {
    for (int64_t o = 0; o < count; ++o)
      for (int64_t i = 0; i < in_pad; ++i)
        to[o * in_pad + i] = i < y.in ? source[o * y.in + i] : T(0);
  } else {
    transpose_rows(source, y.in, count, to);
  }
  if (y.back && y.thin_in) {
    for (int64_t i = 0; i < y.in; ++i)
      for (int64_t o = 0; o < W; ++o)
        packed[y.backward + i * out_pad + first + o] = o < count ? source[o * y.in + i] : T(0);
  } else if (y.back) {
    for (int64_t b = 0; b < blocks_of<T>(y.in); ++b) {
      const int64_t lanes = lanes_of<T>(y.in, b);
      T* panel = packed + y.backward + (b * y.out + first) * W;
      if (y.in == W) {  // as it lies
        for (int64_t i = 0; i < count * W; ++i) panel[i] = source[i];
        break;
      }
      for (int64_t o = 0; o < count; ++o)
        copy_lanes(source + o * y.in + b * W, lanes, panel + o * W);
    }
  }
  for (int64_t o = 0; o < W; ++o)
    packed[y.packed_bias + first + o] = o < count ? params[y.bias + first + o] : T(0);
}

}  // namespace FM_ISA
}  // namespace fastmeta
