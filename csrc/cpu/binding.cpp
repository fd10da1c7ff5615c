// The Python module fastmeta._cpu: structs with writable fields, pointers as integers, and the
// calls.
#include "../binding.h"

#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "isa.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace fastmeta {

namespace {
bool poisoned = false;
thread_local Arena arena;

// A MemoryError in Python, with the size that was asked for.
struct OutOfMemory : std::bad_alloc {
  explicit OutOfMemory(int64_t bytes)
      : text("cpu worker: " + std::to_string(bytes) +
             " bytes of working memory are not to be had; smaller max_memory, fewer threads or a "
             "narrower network need less") {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

const IsaTable* const kTables[] = {
#if defined(__x86_64__)
    &kAvx512Table, &kAvx2Table,
#endif
    &kBaselineTable};

bool supported(const IsaTable* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (table == &kAvx512Table)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (table == &kAvx2Table) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return table == &kBaselineTable;
}

const IsaTable& find(const char* name) {
  for (const IsaTable* table : kTables)
    if (std::strcmp(table->name, name) == 0 && supported(table)) return *table;
  throw py::value_error(std::string("instruction set '") + name +
                        "' is not one this processor runs");
}

void run(const IsaTable& table, const Job& job, bool wide) { table.run[wide](job, arena); }
void run(const IsaTable& table, const CompositeJob& job, bool wide) {
  table.composite[wide](job, arena);
}
void run(const IsaTable& table, const ProjectJob& job, bool wide) { table.project[wide](job); }

py::tuple isas() {
  py::list names;
  for (const IsaTable* table : kTables)
    if (supported(table)) names.append(table->name);
  return py::tuple(names);
}

// GFLOP/s of float multiply-adds in registers on so many threads: the roof of every kernel here.
double fma_peak(const char* isa, int threads, double seconds) {
  const IsaTable& table = find(isa);
  py::gil_scoped_release release;
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
  double best = 0;
  for (const double end = now() + seconds; now() < end;) {
    double count = 0;
    const double start = now();
#pragma omp parallel num_threads(threads) reduction(+ : count)
    count += table.multiply_adds(1 << 18);
    const double rate = 2 * count / (now() - start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}
}  // namespace

Arena::~Arena() { release(); }

void Arena::release() {
  std::free(block_);
  block_ = nullptr;
  size_ = 0;
}

char* Arena::reserve(int64_t bytes) {
  if (bytes > size_) {
    release();
    const int64_t page = 1 << 21, rounded = (bytes + page - 1) / page * page;
    block_ = static_cast<char*>(std::aligned_alloc(page, rounded));
    if (!block_) throw OutOfMemory(bytes);
#if defined(MADV_HUGEPAGE)
    madvise(block_, rounded, MADV_HUGEPAGE);
#endif
    size_ = rounded;
  }
  FM_OPEN_MEMORY(block_, size_);
  if (poisoned) std::memset(block_, 0xff, bytes);
  FM_CLOSE_MEMORY(block_, size_);
  return block_;
}

void Arena::poison(bool on) { poisoned = on; }

}  // namespace fastmeta

PYBIND11_MODULE(_cpu, m) {
  using namespace fastmeta;
  bind_structs(m, [](auto& c) {
    using C = typename std::decay_t<decltype(c)>::type;
    c.def("run", [](const C& job, const char* isa, bool wide) {
      const IsaTable& table = find(isa);
      py::gil_scoped_release release;
      run(table, job, wide);
    });
  });
  m.def("isas", isas, "Instruction sets this processor runs, the widest first.");
  m.def("fma_peak", fma_peak);
  m.def("poison", &Arena::poison, "Fill working memory with NaN before each call.");
  m.def(
      "held", [] { return arena.size(); }, "Bytes this thread's calls keep for the next one.");
  m.def(
      "release", [] { arena.release(); }, "Free them.");
}
