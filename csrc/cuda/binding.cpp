// The Python module fastmeta._cuda (and its twin on the emulator): jobs, pointers as integers, and
// what this build holds.
#include "../binding.h"

#include <string>

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
  if (error) throw std::runtime_error(std::string("emulator: ") + what + ": the block is divided");
  if (!emulator::fault.empty()) throw std::runtime_error(emulator::fault);
#else
  if (!error) return;
  const auto e = static_cast<cudaError_t>(error);
  throw std::runtime_error(std::string("fastmeta cuda: ") + what + ": " + cudaGetErrorName(e) +
                           " (" + cudaGetErrorString(e) + ")");
#endif
}

void run(const Job& job, int mode, uintptr_t room, uintptr_t stream) {
  const Variant& variant = find(job.net.width, mode);
  // What the kernels do not have must not reach them.
  if (const char* reason = resident_objection(job, mode))
    throw py::value_error(std::string("the CUDA kernels do not take this: ") + reason);
  const int needs = resident_bytes(variant, job);
#if defined(FM_EMULATE)
  const int has = 232448;  // as of sm_90
#else
  int device = 0, has = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&has, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
#endif
  if (needs > has)
    throw py::value_error("width " + std::to_string(job.net.width) + ", depth " +
                          std::to_string(job.net.depth) + ": a block needs " +
                          std::to_string(needs) + " bytes of shared memory, the device has " +
                          std::to_string(has));
  int error;
  {
    py::gil_scoped_release release;
    error = variant.run(job, reinterpret_cast<float*>(room), reinterpret_cast<void*>(stream));
  }
  check(error, "launch");
}

}  // namespace
}  // namespace fastmeta

#ifndef FM_MODULE
#define FM_MODULE _cuda
#endif

PYBIND11_MODULE(FM_MODULE, m) {
  using namespace fastmeta;
  bind_structs(m, [](py::class_<Job>& c) {
    c.def("run", run, "Launch on a stream, in a mode (fp32, tf32, fp16, bf16 are 0 to 3).");
    c.def(
        "room", [](const Job& job, int mode) { return 4 * find(job.net.width, mode).room(job); },
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
