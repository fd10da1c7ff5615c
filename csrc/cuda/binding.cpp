// The Python module fastmeta._cuda (and its twin on the emulator): jobs, pointers as integers, and
// what this build holds.
#include "../binding.h"

#include <string>
#include <type_traits>

#include "launch.h"
#include "measure.h"

#if defined(FM_EMULATE)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastmeta {
namespace {

#define FM_VARIANT(width, mode) &kVariant_##width##_##mode,
#define FM_ALL(width) \
  FM_VARIANT(width, fp32) FM_VARIANT(width, tf32) FM_VARIANT(width, fp16) FM_VARIANT(width, bf16)
const Variant* const kVariants[] = {
#if defined(FM_ONLY)
    FM_ONLY
#else
    FM_WIDTHS(FM_ALL)
#endif
};

const Variant& find(int64_t width, int mode) {
  for (const Variant* v : kVariants)
    if (v->width == width && v->mode == mode) return *v;
  throw py::value_error("width " + std::to_string(width) + " is not one that the kernels have");
}

void check(int error, const char* what) {
#if defined(FM_EMULATE)
  std::string fault;
  fault.swap(emulator::fault);
  if (error) throw std::runtime_error(std::string("emulator: ") + what + ": the block is divided");
  if (!fault.empty()) throw std::runtime_error(fault);
#else
  if (!error) return;
  const auto e = static_cast<cudaError_t>(error);
  throw std::runtime_error(std::string("fastmeta cuda: ") + what + ": " + cudaGetErrorName(e) +
                           " (" + cudaGetErrorString(e) + ")");
#endif
}

// The program that holds whole tasks in a block each, where it takes the job and a block has the
// shared memory; null: layer by layer.
const Variant* resident(const Job& job, int mode) {
  if (resident_objection(job, mode)) return nullptr;
  for (const Variant* v : kVariants) {
    if (v->width != job.net.width || v->mode != mode) continue;
#if defined(FM_EMULATE)
    const int has = 232448;  // as of sm_90
#else
    int device = 0, has = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&has, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
#endif
    return resident_bytes(*v, job) <= has ? v : nullptr;
  }
  return nullptr;
}

// What the kernels do not have must not reach them.
void accept(const Job& job, int mode) {
  const Network& n = job.net;
  if (mode < 0 || mode > 3 || n.in < 1 || n.out < 1 || n.width < 1 || n.depth < 2 ||
      n.depth > kMaxDepth)
    throw py::value_error("the CUDA kernels take modes 0 to 3 and depths 2 to " +
                          std::to_string(kMaxDepth));
  for (const Data* d : {&job.data, &job.query})
    if (d->tasks && ((d->measure == Measure::k_march && (n.in != 3 || n.out != 4)) ||
                     (d->measure == Measure::k_project && (n.out != 1 || !d->order))))
      throw py::value_error("rays need a network 3 -> 4, a projection one output and its order");
}

int64_t room_floats(const Job& job, int mode) {
  accept(job, mode);
  const Variant* variant = resident(job, mode);
  return variant ? variant->room(job) : layered_room(job, mode);
}

void run_job(const Job& job, int mode, uintptr_t room, uintptr_t stream) {
  accept(job, mode);
  const Variant* variant = resident(job, mode);
  int error;
  {
    py::gil_scoped_release release;
    float* at = reinterpret_cast<float*>(room);
    void* on = reinterpret_cast<void*>(stream);
    error = variant ? variant->run(job, at, on) : run_layered(job, mode, at, on);
  }
  check(error, "launch");
}

// Jobs that know no width or precision.
template <class C>
void run_alone(const C& job, int, uintptr_t room, uintptr_t stream) {
  int error;
  {
    py::gil_scoped_release release;
    error = run(job, reinterpret_cast<float*>(room), reinterpret_cast<void*>(stream));
  }
  check(error, "launch");
}

template <class C>
int64_t room_floats(const C& job, int) {
  return room_of(job);
}

}  // namespace
}  // namespace fastmeta

#ifndef FM_MODULE
#define FM_MODULE _cuda
#endif

PYBIND11_MODULE(FM_MODULE, m) {
  using namespace fastmeta;
  bind_structs(m, [](auto& c) {
    using C = typename std::decay_t<decltype(c)>::type;
    const char* text = "Launch on a stream, in a mode (fp32, tf32, fp16, bf16 are 0 to 3).";
    if constexpr (std::is_same_v<C, Job>) {
      c.def("run", run_job, text);
      c.def(
          "resident", [](const Job& job, int mode) { return resident(job, mode) != nullptr; },
          "Whether one launch holds whole tasks of it.");
    } else {
      c.def("run", run_alone<C>, text);
    }
    c.def(
        "room", [](const C& job, int mode) { return 4 * room_floats(job, mode); },
        "Bytes of working memory.");
  });
  py::list widths;
  for (const Variant* v : kVariants)
    if (v->mode == kVariants[0]->mode) widths.append(v->width);
  m.attr("WIDTHS") = py::tuple(widths);
  m.attr("MODES") = py::make_tuple("fp32", "tf32", "fp16", "bf16");
  m.def(
      "shared_bytes",
      [](int width, int mode, int depth, bool dual, int encoded, int samples) {
        return find(width, mode).shared_bytes(depth, dual, encoded, samples);
      },
      "Shared memory of a block, in bytes.", py::arg("width"), py::arg("mode"), py::arg("depth"),
      py::arg("dual"), py::arg("encoded") = 0, py::arg("samples") = 0);
#if defined(FM_EMULATE)
  m.def("schedule", [](uint64_t seed, int skipped) {
    emulator::seed = seed;
    emulator::skipped = skipped;
  });
  m.def("device", [](int cluster_limit, int block_limit, int multiprocessors) {
    emulator::cluster_limit = cluster_limit;
    emulator::block_limit = block_limit;
    emulator::multiprocessors = multiprocessors;
  });
  // What stands behind any network, alone: tests give it outputs of their own.
  m.def("network_points", [](const Job& job) { return network_points(job.data); });
  m.def("measure_room", [](const Job& job, int64_t tasks, bool dual) {
    return measure_room(job.data, tasks, dual);
  });
  m.def("lay_points",
        [](const Job& job, int64_t first, int64_t tasks, uintptr_t x, uintptr_t room) {
          check(lay_points(job.net, {&job.data, job.step, first, tasks},
                           reinterpret_cast<float*>(x), reinterpret_cast<float*>(room), nullptr),
                "points");
        });
  m.def("measure_loss", [](const Job& job, int64_t first, int64_t tasks, bool dual, bool back,
                           uintptr_t y, uintptr_t loss, uintptr_t room) {
    check(measure_loss(job.net, {&job.data, job.step, first, tasks}, dual, back,
                       reinterpret_cast<float*>(y), reinterpret_cast<float*>(loss),
                       reinterpret_cast<float*>(room), nullptr),
          "loss");
  });
#endif
}
