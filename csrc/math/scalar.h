// Elementary functions over float and double, under the names that every template of csrc/math
// uses.
//
// A SIMD pack (cpu/pack.h) and Dual (dual.h) bring the same names for their own type; unqualified
// calls find them.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline: plain inline left calls through memory, and an out-of-line copy compiled for a
// wide instruction set could be picked by the linker for a narrow one.
#define FM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastmeta {

#define FM_BOTH(name, f32, f64, ...)                                \
  FM_HOST_DEVICE float name(float x) { return f32(x) __VA_ARGS__; } \
  FM_HOST_DEVICE double name(double x) { return f64(x) __VA_ARGS__; }
FM_BOTH(exp, ::expf, ::exp)
FM_BOTH(expm1, ::expm1f, ::expm1)
FM_BOTH(log1p, ::log1pf, ::log1p)
FM_BOTH(tanh, ::tanhf, ::tanh)
FM_BOTH(erfc, ::erfcf, ::erfc)
FM_BOTH(sqrt, ::sqrtf, ::sqrt)
FM_BOTH(abs, ::fabsf, ::fabs)
#undef FM_BOTH

FM_HOST_DEVICE void sincos(float x, float& s, float& c) { s = ::sinf(x), c = ::cosf(x); }
FM_HOST_DEVICE void sincos(double x, double& s, double& c) { s = ::sin(x), c = ::cos(x); }

FM_HOST_DEVICE float select(bool mask, float a, float b) { return mask ? a : b; }
FM_HOST_DEVICE double select(bool mask, double a, double b) { return mask ? a : b; }

}  // namespace fastmeta
