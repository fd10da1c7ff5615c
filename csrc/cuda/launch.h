// How a job becomes launches: which kernels, their blocks and shared memory, and the sums over
// tasks behind them.
#pragma once

#include "../abi.h"

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

}  // namespace fastmeta
