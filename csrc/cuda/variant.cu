// The kernels of one width in one arithmetic: FM_WIDTH and FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16)
// come from the command line, so that the variants compile side by side.
#include <cmath>

#include "launch.h"
#include "resident.h"
#include "sums.h"

namespace fastmeta {
namespace {

template <bool kDual, bool kRich>
using Kernel = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, kDual, kRich>;

// Whether a job needs the kernels that encode and march.
bool rich(const Job& job) { return job.net.encoded || most_samples(job); }

template <class S>
int launch(const Job& job, float* room, int64_t parts, void* stream) {
  const Network& net = job.net;
  const Plan plan = {
      layout_of<S>(static_cast<int>(net.depth), static_cast<int>(net.in), static_cast<int>(net.out),
                   static_cast<int>(net.encoded), most_samples(job)),
      room_of(job), room};
  const int bytes = plan.layout.size;
  const int error = FM_ALLOW(resident<S>, bytes);
  if (error) return error;
  return FM_LAUNCH(resident<S>, job.data.tasks, parts, S::kThreads, bytes, stream, job, plan);
}

template <bool kRich>
int shared_bytes_of(int depth, bool dual, int encoded, int samples) {
  return dual ? layout_of<Kernel<true, kRich>>(depth, 0, 0, encoded, samples).size
              : layout_of<Kernel<false, kRich>>(depth, 0, 0, encoded, samples).size;
}
int shared_bytes(int depth, bool dual, int encoded, int samples) {
  return encoded || samples ? shared_bytes_of<true>(depth, dual, encoded, samples)
                            : shared_bytes_of<false>(depth, dual, 0, 0);
}

// How many blocks share the points of a task: two for each multiprocessor of a large device, whatever
// the device, so that sums have one order.
template <class S>
int64_t parts_of(const Job& job) {
  if (job.op == Op::k_adapt || job.op == Op::k_maml || job.data.tasks >= 264) return 1;
  const int64_t points = job.data.per_step ? job.data.per_step : job.data.points;
  const int64_t tile = job.data.measure == Measure::k_march
                           ? rays_of_tile<S>(static_cast<int>(job.data.march.samples))
                           : S::kPoints;
  const int64_t tiles = (points + tile - 1) / tile, most = 264 / job.data.tasks;
  return tiles < most ? tiles : most;
}

template <bool kRich>
int64_t room_with(const Job& job) {
  const int64_t plain = parts_of<Kernel<false, kRich>>(job),
                dual = parts_of<Kernel<true, kRich>>(job);
  const int64_t parts = plain > dual ? plain : dual, Q = count_parameters(job.net) + 1;
  return job.data.tasks * (room_of(job).size + (parts > 1 && job.op != Op::k_mlp ? parts * Q : 0));
}

int64_t room(const Job& job) { return rich(job) ? room_with<true>(job) : room_with<false>(job); }

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

template <bool kRich>
int run_with(const Job& job, float* room, void* stream) {
  using Plain = Kernel<false, kRich>;
  using Along = Kernel<true, kRich>;
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

int run(const Job& job, float* room, void* stream) {
  return rich(job) ? run_with<true>(job, room, stream) : run_with<false>(job, room, stream);
}

}  // namespace

#define FM_JOIN_(a, b, c) a##b##_##c
#define FM_JOIN(a, b, c) FM_JOIN_(a, b, c)
extern const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME);
const Variant FM_JOIN(kVariant_, FM_WIDTH, FM_MODE_NAME) = {FM_WIDTH, FM_MODE, shared_bytes, room,
                                                            run};

}  // namespace fastmeta
