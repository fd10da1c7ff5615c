// The kernels of one width in one arithmetic: FM_WIDTH and FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16)
// come from the command line, so that the variants compile side by side.
#include <cmath>

#include "resident.h"
#include "team.h"

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

bool loops(const Job& job) { return job.op == Op::k_adapt || job.op == Op::k_maml; }

template <class S>
Layout layout_for(const Job& job) {
  return layout_of<S>(static_cast<int>(job.net.depth), static_cast<int>(job.net.in),
                      static_cast<int>(job.net.out));
}

// How many shares the tiles of a task are dealt to: as many as a large device holds side by side
// (FM_MULTIPROCESSORS of 228 KiB, of which a block takes 1 KiB more than it asks for), but no more
// than leave the largest of them as small. Whatever the device, so that sums have one order.
template <class S>
int64_t shares_of(const Job& job) {
  const auto points = [](const Data& d) {
    return d.tasks == 0 ? 0 : d.per_step ? d.per_step : d.points;
  };
  const int64_t given = points(job.data), asked = points(job.query);
  const int64_t tiles = ((given > asked ? given : asked) + S::kPoints - 1) / S::kPoints;
  const int64_t room = 228 * 1024 / (layout_for<S>(job).size + 1024);
  const int64_t most =
      FM_MULTIPROCESSORS * (room < S::kBlocks ? room : S::kBlocks) / job.data.tasks;
  if (most < 2 || tiles < 2) return 1;
  const int64_t each = (tiles + most - 1) / most;
  return (tiles + each - 1) / each;
}

template <class S, bool kLoops>
int launch(const Job& job, float* room, int64_t shares, void* stream) {
  const int64_t T = job.data.tasks, counts = kLoops ? T * kCountStride : 0;
  const Layout layout = layout_for<S>(job);
  const Room at = room_of(job);
  Plan plan = {layout,
               at,
               room + counts,
               static_cast<int>(shares),
               false,
               room + counts + T * at.size,
               reinterpret_cast<uint32_t*>(room)};
  const int bytes = layout.size;
  const auto kernel = resident<S, kLoops>;
  int error = FM_ALLOW(kernel, bytes);
  if (error) return error;
  int64_t blocks = shares;
  if (kLoops && shares > 1) {
    plan.cluster = (shares & (shares - 1)) == 0 && shares <= kClusterLimit &&
                   runs_clusters(kernel, shares, S::kThreads, bytes);
    if (!plan.cluster) {
      const int64_t fit = blocks_at_once(kernel, S::kThreads, bytes) / T;
      const int64_t each = fit < 1 ? shares : (shares + fit - 1) / fit;  // shares a block
      blocks = (shares + each - 1) / each;
      if (blocks > 1) error = clear(room, counts * sizeof(float), stream);
    }
    if (error) return error;
    if (blocks > 1)
      return FM_LAUNCH_TEAM(kernel, T, blocks, plan.cluster, S::kThreads, bytes, stream, job, plan);
  }
  return FM_LAUNCH(kernel, T, blocks, S::kThreads, bytes, stream, job, plan);
}

int shared_bytes(int depth, bool dual) {
  return dual ? layout_of<Along>(depth).size : layout_of<Plain>(depth).size;
}

// The counts of a team, what a task keeps, and a row of sums for each share.
int64_t room(const Job& job) {
  const int64_t plain = shares_of<Plain>(job), dual = shares_of<Along>(job);
  const int64_t shares = plain > dual ? plain : dual, Q = count_parameters(job.net) + 1;
  return job.data.tasks * (room_of(job).size + (loops(job) ? kCountStride : 0) +
                           (shares > 1 && job.op != Op::k_mlp ? shares * Q : 0));
}

// A single pass, and the sums of its shares.
template <class S>
int single(const Job& job, void* grad, float* room, void* stream) {
  const int64_t parts = shares_of<S>(job), P = count_parameters(job.net), T = job.data.tasks;
  int error = launch<S, false>(job, room, parts, stream);
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
  if (!loops(job)) {
    const int error = single<Plain>(job, job.grad, room, stream);
    if (error || job.op != Op::k_loss_hvp) return error;
    return single<Along>(job, job.hv, room, stream);
  }
  int error = launch<Plain, true>(job, room, shares_of<Plain>(job), stream);
  if (error) return error;
  if (job.op != Op::k_maml) return 0;
  if (job.order == 2 && job.steps)
    error = launch<Along, true>(job, room, shares_of<Along>(job), stream);
  if (error) return error;
  const Room at = room_of(job);
  const int64_t P = count_parameters(job.net), *size = job.rates_size;
  room += tasks * kCountStride;
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
