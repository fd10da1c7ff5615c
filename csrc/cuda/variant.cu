// The kernels of one width in one arithmetic: FM_WIDTH and FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16)
// come from the command line, so that the variants compile side by side.
#include <cmath>

#include "launch.h"
#include "resident.h"

namespace fastmeta {
namespace {

using Plain = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, false>;
using Along = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, true>;

// out [size] = Σ_t of from [T, stride], in the order of the tasks; split: one row for each task.
FM_KERNEL void sum_tasks(const float* from, int64_t stride, int64_t tasks, float* out,
                         int64_t count, int64_t inner, int64_t split) {
  const int64_t i = static_cast<int64_t>(block_x()) * 128 + thread_index();
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

// out [T, count] = Σ over a task's parts of from [T, parts, stride], columns first to first + count.
FM_KERNEL void sum_parts(const float* from, int64_t parts, int64_t stride, float* out,
                         int64_t tasks, int64_t count, int64_t first) {
  const int64_t i = static_cast<int64_t>(block_x()) * 128 + thread_index();
  if (i >= tasks * count) return;
  const float* row = from + i / count * parts * stride + first + i % count;
  float sum = 0;
  for (int64_t s = 0; s < parts; ++s) sum += row[s * stride];
  out[i] = sum;
}

int sum(const float* from, int64_t stride, int64_t tasks, void* out, int64_t count, int64_t inner,
        int64_t split, void* stream) {
  return FM_LAUNCH(sum_tasks, (count + 127) / 128, 1, 128, 0, stream, from, stride, tasks,
                   static_cast<float*>(out), count, inner, split);
}

template <class S>
int launch(const Job& job, float* room, int64_t parts, void* stream) {
  const Network& net = job.net;
  const Plan plan = {layout_of<S>(static_cast<int>(net.depth), static_cast<int>(net.in),
                                  static_cast<int>(net.out)),
                     room_of(job), room};
  const int bytes = plan.layout.size;
  const int error = FM_ALLOW(resident<S>, bytes);
  if (error) return error;
  return FM_LAUNCH(resident<S>, job.data.tasks, parts, S::kThreads, bytes, stream, job, plan);
}

int shared_bytes(int depth, bool dual) {
  return dual ? layout_of<Along>(depth).size : layout_of<Plain>(depth).size;
}

// How many blocks share the points of a task: two for each multiprocessor of a large device, whatever
// the device, so that sums have one order.
template <class S>
int64_t parts_of(const Job& job) {
  if (job.op == Op::k_adapt || job.op == Op::k_maml || job.data.tasks >= 264) return 1;
  const int64_t points = job.data.per_step ? job.data.per_step : job.data.points;
  const int64_t tiles = (points + S::kPoints - 1) / S::kPoints, most = 264 / job.data.tasks;
  return tiles < most ? tiles : most;
}

int64_t room(const Job& job) {
  const int64_t plain = parts_of<Plain>(job), dual = parts_of<Along>(job);
  const int64_t parts = plain > dual ? plain : dual, Q = count_parameters(job.net) + 1;
  return job.data.tasks * (room_of(job).size + (parts > 1 && job.op != Op::k_mlp ? parts * Q : 0));
}

// A single pass, and the sums of its blocks.
template <class S>
int single(const Job& job, void* grad, float* room, void* stream) {
  const int64_t parts = parts_of<S>(job), P = count_parameters(job.net), T = job.data.tasks;
  int error = launch<S>(job, room, parts, stream);
  if (error || parts == 1 || job.op == Op::k_mlp) return error;
  if (grad)
    error = FM_LAUNCH(sum_parts, (T * P + 127) / 128, 1, 128, 0, stream, room, parts, P + 1,
                      static_cast<float*>(grad), T, P, int64_t{0});
  if (error || !job.loss) return error;
  return FM_LAUNCH(sum_parts, (T + 127) / 128, 1, 128, 0, stream, room, parts, P + 1,
                   static_cast<float*>(job.loss), T, int64_t{1}, P);
}

int run(const Job& job, float* room, void* stream) {
  const int64_t tasks = job.data.tasks;
  if (job.op == Op::k_mlp_dual) return single<Along>(job, job.grad, room, stream);
  if (job.op != Op::k_adapt && job.op != Op::k_maml) {
    const int error = single<Plain>(job, job.grad, room, stream);
    if (error || job.op != Op::k_loss_hvp) return error;
    return single<Along>(job, job.hv, room, stream);
  }
  int error = launch<Plain>(job, room, 1, stream);
  if (error) return error;
  if (job.op != Op::k_maml) return 0;
  if (job.order == 2 && job.steps) error = launch<Along>(job, room, 1, stream);
  if (error) return error;
  const Room at = room_of(job);
  const int64_t P = count_parameters(job.net), *size = job.rates_size;
  error = sum(room + at.lambda, at.size, tasks, job.grad, P, P, 1, stream);
  if (error || !job.rates || !job.steps) return error;
  return sum(room + at.rates, at.size, tasks, job.rates, size[0] * size[1] * size[2], size[2],
             size[1], stream);
}

}  // namespace

#define FM_JOIN_(a, b, c) a##b##_##c
#define FM_JOIN(a, b, c) FM_JOIN_(a, b, c)
extern const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME);
const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME) = {FM_WIDTH, FM_MODE, shared_bytes, room,
                                                            run};

}  // namespace fastmeta
