// Every intrinsic that the kernels use, each behind one function, so that the same source runs on
// the CPU: with FM_EMULATE the twins of emulator.h stand in.
//
// A warp-wide function must be called by all 32 lanes. Fragments are those of the PTX manual: lane =
// 4 g + t; of C [16,8] a lane holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/scalar.h"

#if defined(FM_EMULATE)
#include "emulator.h"
#define FM_DEVICE inline __attribute__((always_inline))
#define FM_KERNEL
#define FM_BOUNDS(threads, blocks)
#define FM_CONSTANT const
#define FM_UNROLL
#define FM_UNROLL_8
#define FM_UNROLL_1
#else
#include <cuda_runtime.h>
#define FM_DEVICE __device__ __forceinline__
#define FM_KERNEL __global__
#define FM_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// read where the launch put it: a copy would lie in each thread's own memory
#define FM_CONSTANT const __grid_constant__
#define FM_UNROLL _Pragma("unroll")
#define FM_UNROLL_8 _Pragma("unroll 8")
#define FM_UNROLL_1 _Pragma("unroll 1")
#endif

namespace fastmeta {

FM_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FM_HOST_DEVICE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
// The count of arrivals at which all blocks of a team are there, from what it was before one's own.
FM_HOST_DEVICE uint32_t all_arrived(uint32_t before, uint32_t blocks) {
  return before - before % blocks + blocks;
}

#if defined(FM_EMULATE)

FM_DEVICE int thread_index() { return emulator::thread(); }
FM_DEVICE int block_x() { return emulator::block.x; }
FM_DEVICE int block_y() { return emulator::block.y; }
FM_DEVICE int blocks_y() { return emulator::grid.y; }
FM_DEVICE char* shared_memory() { return emulator::shared; }
// __COUNTER__ numbers the places where a block meets, from FM_PLACES on in each source: the emulator
// can leave one out.
#ifndef FM_PLACES
#define FM_PLACES 0
#endif
#define FM_MEET() emulator::meet(FM_PLACES + __COUNTER__)
// The blocks of a team meet: those of one x.
#define FM_MEET_TEAM(cluster, arrived) meet_team(FM_PLACES + __COUNTER__, cluster, arrived)
// A count of arrivals is kept as on the device, where a team that is no cluster waits for it.
inline void meet_team(int place, bool cluster, uint32_t* arrived) {
  const uint32_t blocks = static_cast<uint32_t>(blocks_y());
  const bool counts = place != emulator::skipped && !cluster && blocks > 1 && thread_index() == 0;
  const uint32_t before = counts ? (*arrived)++ : 0, all = all_arrived(before, blocks);
  emulator::meet(place, emulator::State::kMeetingTeam);
  if (counts && (before > 1u << 30 || *arrived < all || *arrived > all + blocks))
    emulator::fault = "the count of a team's arrivals is off";
}
FM_DEVICE const float* of_rank(const float* p, int rank) { return emulator::of_rank(p, rank); }

FM_DEVICE float shuffle_xor(float x, int mask) {
  return float_of(emulator::exchange(bits_of(x), mask));
}
FM_DEVICE float shuffle_from(float x, int lane) {
  return float_of(emulator::exchange_from(bits_of(x), lane));
}
FM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::load_matrices(r, row, transposed);
}
FM_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<16>(c, a, b, emulator::half_pair);
}
FM_DEVICE void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<16>(c, a, b, emulator::bfloat_pair);
}
FM_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_tf32(c, a, b);
}
FM_DEVICE uint32_t pack_half(float low, float high) {
  return emulator::to_half(low) | static_cast<uint32_t>(emulator::to_half(high)) << 16;
}
FM_DEVICE uint32_t pack_bfloat(float low, float high) {
  return emulator::to_bfloat(low) | static_cast<uint32_t>(emulator::to_bfloat(high)) << 16;
}
FM_DEVICE float half_value(uint16_t h) { return emulator::from_half(h); }
FM_DEVICE uint32_t to_tf32(float x) { return emulator::to_tf32(x); }
FM_DEVICE float sine_of_reduced(float r) { return static_cast<float>(::sin(double(r))); }
FM_DEVICE float cosine_of_reduced(float r) { return static_cast<float>(::cos(double(r))); }
FM_DEVICE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }

#else

FM_DEVICE int thread_index() { return threadIdx.x; }
FM_DEVICE int block_x() { return blockIdx.x; }
FM_DEVICE int block_y() { return blockIdx.y; }
FM_DEVICE int blocks_y() { return gridDim.y; }
FM_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char fastmeta_shared[];
  return fastmeta_shared;
}
#define FM_MEET() __syncthreads()
#define FM_MEET_TEAM(cluster, arrived) meet_team(cluster, arrived)

// The blocks of one x meet, and what each wrote is there for all: as a cluster, or, where they are
// all resident, by counting arrivals. The count only grows, from 0 at the launch.
FM_DEVICE void meet_team(bool cluster, uint32_t* arrived) {
  if (cluster) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __trap();
#endif
    return;
  }
  __syncthreads();
  const uint32_t blocks = gridDim.y;
  if (blocks == 1) return;
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t all = all_arrived(atomicAdd(arrived, 1u), blocks);
    uint32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    } while (now < all);
    __threadfence();
  }
  __syncthreads();
}
// What lies in the shared memory of the cluster's block of that rank where p lies in this one's.
FM_DEVICE const float* of_rank(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t at;
  asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(p), "r"(rank));
  return reinterpret_cast<const float*>(at);
#else
  return rank ? nullptr : p;
#endif
}

FM_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The x of a lane, modulo 32.
FM_DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Four 8 x 8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8. Register m of lane
// 4 g + t holds (g, 2t) and (g, 2t+1) of matrix m; transposed, (2t, g) and (2t+1, g).
FM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
}

#define FM_MMA(name, shape)                                                           \
  FM_DEVICE void name(float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {   \
    asm volatile("mma.sync.aligned." shape                                            \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                           \
                 "{%0,%1,%2,%3};"                                                     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
FM_MMA(mma_half, "m16n8k16.row.col.f32.f16.f16.f32")
FM_MMA(mma_bfloat, "m16n8k16.row.col.f32.bf16.bf16.f32")
FM_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FM_MMA

FM_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t u;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  return u;
}
FM_DEVICE uint32_t pack_bfloat(float low, float high) {
  uint32_t u;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
  return u;
}
FM_DEVICE float half_value(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
FM_DEVICE uint32_t to_tf32(float x) {
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x));
  return u;
}
// The special function unit: absolute error 2^-20.9 on [-π, π], which is why callers reduce first.
FM_DEVICE float sine_of_reduced(float r) {
  float y;
  asm("sin.approx.f32 %0, %1;" : "=f"(y) : "f"(r));
  return y;
}
FM_DEVICE float cosine_of_reduced(float r) {
  float y;
  asm("cos.approx.f32 %0, %1;" : "=f"(y) : "f"(r));
  return y;
}
FM_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#endif

// Sums over a quad of lanes (4 g + 0..3), and over a warp; every lane gets the sum.
FM_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
FM_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}
FM_DEVICE float warp_max(float x) {
  for (int mask = 16; mask; mask >>= 1) {
    const float other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// x − 2π rint(x / 2π) in two terms of 2π (Cody-Waite): about 1e-7 of absolute error to |x| = 1000.
FM_DEVICE float reduce_turns(float x) {
  const float n = ::rintf(x * 0.15915494309189535f);
  return fused(n, 1.7484555e-7f, fused(n, -6.28318548202514648f, x));
}

// Sine and cosine to about an ulp of 1, by polynomials on [-π/4, π/4]: for the arithmetic that
// promises float32.
FM_DEVICE void sincos_polynomial(float x, float& s, float& c) {
  const float n = ::rintf(x * 0.63661977236758134f);
  float r = fused(n, -1.5707962513e+0f, x);
  r = fused(n, -7.5497894159e-8f, r);
  r = fused(n, -5.3903029534e-15f, r);
  const float q = r * r;
  const float sine =
      fused(fused(fused(-1.9515295891e-4f, q, 8.3321608736e-3f), q, -1.6666654611e-1f), q * r, r);
  const float cosine = fused(
      fused(fused(2.443315711809948e-5f, q, -1.388731625493765e-3f), q, 4.166664568298827e-2f),
      q * q, fused(-0.5f, q, 1.0f));
  const int turn = static_cast<int>(n) & 3;
  const float first = turn & 1 ? cosine : sine, second = turn & 1 ? sine : cosine;
  s = turn & 2 ? -first : first;
  c = (turn + 1) & 2 ? -second : second;
}

}  // namespace fastmeta
