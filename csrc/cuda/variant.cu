// The kernels of one width in one arithmetic: FM_WIDTH and FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16)
// come from the command line, so that the variants compile side by side.
#include <cmath>

#include "resident.h"
#include "sums.h"
#include "team.h"

namespace fastmeta {
namespace {

template <bool kDual, bool kRich>
using Kernel = Shape<static_cast<Mode>(FM_MODE), FM_WIDTH, kDual, kRich>;

// Whether a job needs the kernels that encode and march.
bool rich(const Job& job) { return job.net.encoded || most_samples(job); }

bool loops(const Job& job) { return job.op == Op::k_adapt || job.op == Op::k_maml; }

template <class S>
Layout layout_for(const Job& job) {
  return layout_of<S>(static_cast<int>(job.net.depth), static_cast<int>(job.net.in),
                      static_cast<int>(job.net.out), static_cast<int>(job.net.encoded),
                      most_samples(job));
}

// How many shares the tiles of a task are dealt to: as many as a large device holds side by side
// (FM_MULTIPROCESSORS of 228 KiB, of which a block takes 1 KiB more than it asks for), but no more
// than leave the largest of them as small. Whatever the device, so that sums have one order.
template <class S>
int64_t shares_of(const Job& job) {
  const auto tiles_of = [](const Data& d) -> int64_t {
    if (!d.tasks) return 0;
    const int64_t units = d.measure == Measure::k_march
                              ? rays_of_tile<S>(static_cast<int>(d.march.samples))
                              : S::kPoints;
    return ((d.per_step ? d.per_step : d.points) + units - 1) / units;
  };
  const int64_t given = tiles_of(job.data), asked = tiles_of(job.query);
  const int64_t tiles = given > asked ? given : asked;
  const int64_t room = 228 * 1024 / (layout_for<S>(job).size + 1024);
  const int64_t most =
      FM_MULTIPROCESSORS * (room < S::kBlocks ? room : S::kBlocks) / job.data.tasks;
  if (most < 2 || tiles < 2) return 1;
  const int64_t each = (tiles + most - 1) / most;
  return (tiles + each - 1) / each;
}

// Whether a row of sums has room in shared memory, over the operands.
template <class S>
bool row_fits(const Job& job) {
  return 4 * (count_parameters(job.net) + 1) <= layout_for<S>(job).slopes;
}
// Rows of sums in device memory: where single passes leave several, and where a loop's do not lie in
// shared memory.
template <class S>
int64_t rows_of(const Job& job) {
  const int64_t shares = shares_of<S>(job);
  if (job.op == Op::k_mlp) return 0;
  return shares > 1 || (loops(job) && !row_fits<S>(job)) ? shares : 0;
}

template <class S, bool kLoops>
int launch(const Job& job, float* room, int64_t shares, void* stream) {
  const int64_t T = job.data.tasks, counts = kLoops ? T * kCountStride : 0;
  const Layout layout = layout_for<S>(job);
  Plan plan = {};
  plan.layout = layout;
  plan.at = room_of(job);
  plan.shares = static_cast<int>(shares);
  plan.arrived = reinterpret_cast<uint32_t*>(room);
  plan.room = room + counts;
  plan.rows = plan.room + T * plan.at.size;
  const bool fits = row_fits<S>(job);
  const int bytes = layout.size;
  const auto kernel = resident<S, kLoops>;
  int error = FM_ALLOW(kernel, bytes);
  if (error) return error;
  int64_t blocks = shares;
  plan.held = kLoops && fits && shares == 1;
  if (kLoops && shares > 1) {
    plan.cluster = fits && (shares & (shares - 1)) == 0 && shares <= kClusterLimit &&
                   runs_clusters(kernel, shares, S::kThreads, bytes);
    plan.held = plan.cluster;
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

template <bool kRich>
int shared_bytes_of(int depth, bool dual, int encoded, int samples) {
  return dual ? layout_of<Kernel<true, kRich>>(depth, 0, 0, encoded, samples).size
              : layout_of<Kernel<false, kRich>>(depth, 0, 0, encoded, samples).size;
}
int shared_bytes(int depth, bool dual, int encoded, int samples) {
  return encoded || samples ? shared_bytes_of<true>(depth, dual, encoded, samples)
                            : shared_bytes_of<false>(depth, dual, 0, 0);
}

// The counts of a team, what a task keeps, and its rows of sums.
template <bool kRich>
int64_t room_with(const Job& job) {
  const int64_t plain = rows_of<Kernel<false, kRich>>(job),
                dual = rows_of<Kernel<true, kRich>>(job);
  const int64_t rows = plain > dual ? plain : dual;
  return job.data.tasks * (room_of(job).size + (loops(job) ? kCountStride : 0) +
                           rows * (count_parameters(job.net) + 1));
}

int64_t room(const Job& job) { return rich(job) ? room_with<true>(job) : room_with<false>(job); }

// A single pass, and the sums of its shares.
template <class S>
int single(const Job& job, void* grad, float* room, void* stream) {
  const int64_t parts = shares_of<S>(job), P = count_parameters(job.net), T = job.data.tasks;
  int error = launch<S, false>(job, room, parts, stream);
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
  return leave_meta(job, room + job.data.tasks * kCountStride, room_of(job), stream);
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
