// The kernels of one width in one arithmetic: FM_WIDTH and FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16)
// come from the command line, so that the variants compile side by side.
#include <cmath>

#include "launch.h"
#include "resident.h"
#include "sums.h"

namespace fastmeta {
namespace {

using Plain = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, false>;
using Along = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, true>;

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
    error = sum_parts(room, parts, P + 1, static_cast<float*>(grad), P, T, P, 0, false, stream);
  if (error || !job.loss) return error;
  return sum_parts(room, parts, P + 1, static_cast<float*>(job.loss), 1, T, 1, P, false, stream);
}

int run(const Job& job, float* room, void* stream) {
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
  return leave_meta(job, room, room_of(job), stream);
}

}  // namespace

#define FM_JOIN_(a, b, c) a##b##_##c
#define FM_JOIN(a, b, c) FM_JOIN_(a, b, c)
extern const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME);
const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME) = {FM_WIDTH, FM_MODE, shared_bytes, room,
                                                            run};

}  // namespace fastmeta
