// What an instruction set's file offers: one table of functions, in float and in double.
#pragma once

#include "../abi.h"
#include "arena.h"

namespace fastmeta {

// composite alone. raw [R, S, 4], t [R, S]; vraw and vt null: plain. Forward writes rgb [R, 3],
// depth [R], acc [R]; given the adjoints g*, backward writes graw and gt; with tangents all outputs
// are tangents.
struct CompositeJob {
  March march;
  int threads = 1;
  int64_t rays = 0;
  const void *raw = nullptr, *t = nullptr, *vraw = nullptr, *vt = nullptr;
  const void *grgb = nullptr, *gdepth = nullptr, *gacc = nullptr;
  void *rgb = nullptr, *depth = nullptr, *acc = nullptr, *graw = nullptr, *gt = nullptr;
};

// project alone, or its adjoint: image [T, W, W], pixels [T, A, W, W], sinogram [T, A, W].
struct ProjectJob {
  int threads = 1;
  int64_t tasks = 0, angles = 0, size = 0;
  const int32_t* pixels = nullptr;
  const void* from = nullptr;
  void* to = nullptr;
  int adjoint = 0;
};

struct IsaTable {
  const char* name;
  void (*run[2])(const Job&, Arena&);  // float, double
  void (*composite[2])(const CompositeJob&, Arena&);
  void (*project[2])(const ProjectJob&);
  double (*multiply_adds)(
      int64_t rounds);  // float multiply-adds that ran, on one thread, as fast as registers allow
};

extern const IsaTable kBaselineTable;
#if defined(__x86_64__)
extern const IsaTable kAvx2Table, kAvx512Table;
#endif

}  // namespace fastmeta
