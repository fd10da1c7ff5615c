// Sums over blocks and over tasks, in their order: small kernels behind the large ones, compiled
// once.
#pragma once

#include "walk.h"

namespace fastmeta {

// out [T] rows of count numbers, out_stride apart (+)= Σ over a task's parts of from [T, parts,
// stride], columns first to first + count; add: to what is there. Returns the CUDA error.
int sum_parts(const float* from, int64_t parts, int64_t stride, float* out, int64_t out_stride,
              int64_t tasks, int64_t count, int64_t first, bool add, void* stream);

// What a meta-gradient leaves: λ_0 and the rates' gradients, summed over tasks. Returns the CUDA
// error.
int leave_meta(const Job& job, const float* room, const Room& at, void* stream);

}  // namespace fastmeta
