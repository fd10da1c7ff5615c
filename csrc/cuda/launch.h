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

// One width in one arithmetic, compiled on its own.
struct Variant {
  int width, mode;
  int (*shared_bytes)(int depth, bool dual);
  int64_t (*room)(const Job& job);                        // floats of working memory
  int (*run)(const Job& job, float* room, void* stream);  // the CUDA error
};

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
