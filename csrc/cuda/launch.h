// How a job becomes launches: which kernels, their blocks and shared memory, and the sums over
// tasks behind them.
#pragma once

#include "../abi.h"

#if defined(FM_EMULATE)
#include "emulator.h"
// Runs a kernel on a grid of x by y blocks: the CUDA error, or 1 where the emulator's block is
// divided.
#define FM_LAUNCH(kernel, x, y, threads, bytes, stream, ...)                                 \
  (static_cast<void>(stream), emulator::launch({static_cast<int>(x), static_cast<int>(y)},   \
                                               threads, bytes, [&] { kernel(__VA_ARGS__); }) \
                                  ? 0                                                        \
                                  : 1)
// Lets a kernel have more than 48 KiB of shared memory.
#define FM_ALLOW(kernel, bytes) 0
#else
#define FM_LAUNCH(kernel, x, y, threads, bytes, stream, ...)                          \
  (kernel<<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), threads, bytes, \
            static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__),                        \
   static_cast<int>(cudaGetLastError()))
#define FM_ALLOW(kernel, bytes)                                                              \
  static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                        static_cast<int>(bytes)))
#endif

namespace fastmeta {

// Samples of the longest ray of a job; 0: no rays.
inline int most_samples(const Job& job) {
  int64_t most = 0;
  for (const Data* d : {&job.data, &job.query})
    if (d->tasks && d->measure == Measure::k_march && d->march.samples > most)
      most = d->march.samples;
  return static_cast<int>(most);
}

// Whether any launch of a job is on dual numbers.
inline bool goes_along(const Job& job) {
  return job.op == Op::k_loss_hvp || job.op == Op::k_mlp_dual ||
         (job.op == Op::k_maml && job.order == 2);
}

// Why the resident program does not take a job in a mode, or null: it does, where a block has the
// shared memory (resident_bytes). Its width must be one of FM_WIDTHS.
inline const char* resident_objection(const Job& job, int mode) {
  const Network& n = job.net;
  if (n.in < 1 || n.in > 4) return "it takes 1 to 4 coordinates";
  if (n.out < 1 || n.out > 8) return "it takes 1 to 8 outputs";
  if (n.depth < 2 || n.depth > 6) return "it takes depths 2 to 6";
  if (n.encoded < 0 || n.encoded > 1024) return "it takes 1024 features at most";
  if (n.encoded && n.activation == Activation::k_sine && mode != 0)
    return "a sine network's first layer is float32: on features it takes fp32 alone";
  for (const Data* d : {&job.data, &job.query}) {
    if (d->points > 1 << 30 || d->per_step > 1 << 30)  // of which it counts with 32 bits
      return "it takes 2^30 points or rays a task at most";
    if (!d->tasks || d->measure == Measure::k_none) continue;
    if (d->measure != Measure::k_march) return "it takes no projections";
    if (n.in != 3 || n.out != 4) return "rays need 3 coordinates and 4 outputs";
    if (d->march.samples < 2 || d->march.samples > 512) return "it takes rays of 2 to 512 samples";
  }
  return nullptr;
}

// One width in one arithmetic, compiled on its own.
struct Variant {
  int width, mode;
  int (*shared_bytes)(int depth, bool dual, int encoded, int samples);  // of a block
  int64_t (*room)(const Job& job);                                      // floats of working memory
  int (*run)(const Job& job, float* room, void* stream);                // the CUDA error
};

// Shared memory of the largest block of a job.
inline int resident_bytes(const Variant& variant, const Job& job) {
  const int depth = static_cast<int>(job.net.depth), encoded = static_cast<int>(job.net.encoded);
  const int samples = most_samples(job);
  const int plain = variant.shared_bytes(depth, false, encoded, samples);
  const int dual = goes_along(job) ? variant.shared_bytes(depth, true, encoded, samples) : 0;
  return plain > dual ? plain : dual;
}

#define FM_WIDTHS(X) X(16) X(32) X(64)
#define FM_MODES(X) X(fp32) X(tf32) X(fp16) X(bf16)

#define FM_DECLARE_MODE(width, mode) extern const Variant kVariant_##width##_##mode;
#define FM_DECLARE(width)      \
  FM_DECLARE_MODE(width, fp32) \
  FM_DECLARE_MODE(width, tf32) FM_DECLARE_MODE(width, fp16) FM_DECLARE_MODE(width, bf16)
FM_WIDTHS(FM_DECLARE)
#undef FM_DECLARE
#undef FM_DECLARE_MODE

// The same for networks of any size, layer by layer: layered_loop.cu.
int64_t layered_room(const Job& job, int mode);
int run_layered(const Job& job, int mode, float* room, void* stream);

}  // namespace fastmeta
