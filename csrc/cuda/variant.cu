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
FM_KERNEL void sum_tasks(const float* from, int64_t stride, int64_t tasks, float* out, int64_t count,
                         int64_t inner, int64_t split) {
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

#if defined(FM_EMULATE)
#define FM_LAUNCH(kernel, x, y, threads, bytes, stream, ...)                               \
  (emulator::launch({static_cast<int>(x), static_cast<int>(y)}, threads, bytes,            \
                    [&] { kernel(__VA_ARGS__); })                                          \
       ? 0                                                                                 \
       : 1)
template <class S>
int allow(int) {
  return 0;
}
#else
#define FM_LAUNCH(kernel, x, y, threads, bytes, stream, ...)                              \
  (kernel<<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), threads, bytes,     \
            static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__),                            \
   static_cast<int>(cudaGetLastError()))
template <class S>
int allow(int bytes) {
  return static_cast<int>(
      cudaFuncSetAttribute(resident<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
#endif

int sum(const float* from, int64_t stride, int64_t tasks, void* out, int64_t count, int64_t inner,
        int64_t split, void* stream) {
  static_cast<void>(stream);
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
  static_cast<void>(stream);  // the emulator has none
  const int error = allow<S>(bytes);
  if (error) return error;
  return FM_LAUNCH(resident<S>, job.data.tasks, parts, S::kThreads, bytes, stream, job, plan);
}

int shared_bytes(int depth, bool dual) {
  return dual ? layout_of<Along>(depth).size : layout_of<Plain>(depth).size;
}

int64_t room(const Job& job) { return job.data.tasks * room_of(job).size; }

int run(const Job& job, float* room, void* stream) {
  const int64_t tasks = job.data.tasks;
  if (job.op == Op::k_mlp_dual) return launch<Along>(job, room, 1, stream);
  int64_t parts = 1;
  if (job.op == Op::k_mlp) {  // nothing is summed: the points of few tasks may fill the device
    const int64_t tiles = (job.data.points + Plain::kPoints - 1) / Plain::kPoints;
    parts = tasks >= 264 ? 1 : 264 / tasks;
    parts = parts < tiles ? parts : tiles;
  }
  int error = launch<Plain>(job, room, parts, stream);
  if (error) return error;
  if (job.op == Op::k_loss_hvp) return launch<Along>(job, room, 1, stream);
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
