// The products of one mode: FM_MODE (0 fp32, 1 tf32, 2 fp16, 3 bf16) comes from the command line, so
// that they compile side by side.
#include <cmath>

#define FM_PLACES 100
#include "launch.h"
#include "layered.h"

namespace fastmeta {
namespace {

constexpr Mode kMode = static_cast<Mode>(FM_MODE);

template <bool kDual, Way kWay, bool kThin>
int start(const Product& p, int64_t tasks, int64_t parts, void* stream) {
  constexpr auto kernel = layer<kMode, kDual, kWay, kThin>;
  constexpr int bytes = Tile<kMode, kDual, kWay, kThin>::kBytes;
  const int error = FM_ALLOW(kernel, bytes);
  if (error) return error;
  return FM_LAUNCH(kernel, tasks * p.row_tiles * p.column_tiles, parts, kTileThreads, bytes, stream,
                   p);
}

template <bool kDual, bool kThin>
int start(Way way, const Product& p, int64_t tasks, int64_t parts, void* stream) {
  if (way == Way::kForward) return start<kDual, Way::kForward, kThin>(p, tasks, parts, stream);
  if (way == Way::kBack) return start<kDual, Way::kBack, kThin>(p, tasks, parts, stream);
  return start<kDual, Way::kGradient, kThin>(p, tasks, parts, stream);
}

int product(Way way, bool dual, bool narrow, const Product& p, int64_t tasks, int64_t parts,
            void* stream) {
  if constexpr (kMode == Mode::kFp32) {
    if (narrow)
      return dual ? start<true, true>(way, p, tasks, parts, stream)
                  : start<false, true>(way, p, tasks, parts, stream);
  } else if (narrow) {
    return 1;  // invalid value: edges are fp32's
  }
  return dual ? start<true, false>(way, p, tasks, parts, stream)
              : start<false, false>(way, p, tasks, parts, stream);
}

}  // namespace

#define FM_JOIN_(a, b) a##b
#define FM_JOIN(a, b) FM_JOIN_(a, b)
extern const Layered FM_JOIN(kLayered_, FM_MODE_NAME);
const Layered FM_JOIN(kLayered_, FM_MODE_NAME) = {FM_MODE, product};

}  // namespace fastmeta
