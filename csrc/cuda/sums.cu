#include <cmath>

#include "launch.h"
#include "sums.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128;

// out [size] = Σ_t of from [T, stride], in the order of the tasks; split: one row for each task.
FM_KERNEL void sum_tasks(const float* from, int64_t stride, int64_t tasks, float* out,
                         int64_t count, int64_t inner, int64_t split) {
  const int64_t i = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (i >= count) return;
  if (split > 1) {  // out [outer, T, inner]
    const int64_t task = i / inner % tasks;
    out[i] = from[task * stride + i / (inner * tasks) * inner + i % inner];
    return;
  }
  float sum = 0;
  for (int64_t t = 0; t < tasks; ++t) sum += from[t * stride + i];
  out[i] = sum;
}

FM_KERNEL void sum_blocks(const float* from, int64_t parts, int64_t stride, float* out,
                          int64_t out_stride, int64_t tasks, int64_t count, int64_t first,
                          bool add) {
  const int64_t i = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (i >= tasks * count) return;
  const float* row = from + i / count * parts * stride + first + i % count;
  float* to = out + i / count * out_stride + i % count;
  float sum = add ? *to : 0.0f;
  for (int64_t s = 0; s < parts; ++s) sum += row[s * stride];
  *to = sum;
}

int over_tasks(const float* from, int64_t stride, int64_t tasks, void* out, int64_t count,
               int64_t inner, int64_t split, void* stream) {
  return FM_LAUNCH(sum_tasks, (count + kThreads - 1) / kThreads, 1, kThreads, 0, stream, from,
                   stride, tasks, static_cast<float*>(out), count, inner, split);
}

}  // namespace

int sum_parts(const float* from, int64_t parts, int64_t stride, float* out, int64_t out_stride,
              int64_t tasks, int64_t count, int64_t first, bool add, void* stream) {
  return FM_LAUNCH(sum_blocks, (tasks * count + kThreads - 1) / kThreads, 1, kThreads, 0, stream,
                   from, parts, stride, out, out_stride, tasks, count, first, add);
}

int leave_meta(const Job& job, const float* room, const Room& at, void* stream) {
  const int64_t tasks = job.data.tasks, P = at.parameters, *size = job.rates_size;
  const int error = over_tasks(room + at.lambda, at.size, tasks, job.grad, P, P, 1, stream);
  if (error || !job.rates || !job.steps) return error;
  return over_tasks(room + at.rates, at.size, tasks, job.rates, size[0] * size[1] * size[2],
                    size[2], size[1], stream);
}

}  // namespace fastmeta
