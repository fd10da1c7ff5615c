// What an instruction set's file offers: one table of functions, in float and in double.
#pragma once

#include "../abi.h"
#include "arena.h"

namespace fastmeta {

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
