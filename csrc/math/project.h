// The CT projector: sino[a,c] = (1/W) Σ_r image[k(a,r,c)], k the nearest pixel, −1 outside; and its
// adjoint, which adds s̄ino[a,c] / W to the pixels that were read. Linear: values and tangents go
// through the same two maps.
#pragma once

#include "scalar.h"

namespace fastmeta {

// pixels [W, W] of one angle -> its line of W sums.
template <class T>
FM_HOST_DEVICE void project_angle(const T* image, const int32_t* pixels, int64_t size, T* line) {
  for (int64_t c = 0; c < size; ++c) line[c] = 0;
  for (int64_t r = 0; r < size; ++r)
    for (int64_t c = 0; c < size; ++c) {
      const int32_t k = pixels[r * size + c];
      line[c] += k < 0 ? T(0) : image[k];
    }
  for (int64_t c = 0; c < size; ++c) line[c] /= static_cast<T>(size);
}

// Adds one angle's line to the pixels of [first, last): each worker owns a range, so that sums keep
// one order.
template <class T>
FM_HOST_DEVICE void project_angle_adjoint(const T* line, const int32_t* pixels, int64_t size,
                                          int64_t first, int64_t last, T* image) {
  const T scale = static_cast<T>(size);
  for (int64_t r = 0; r < size; ++r)
    for (int64_t c = 0; c < size; ++c) {
      const int32_t k = pixels[r * size + c];
      if (k >= first && k < last) image[k] += line[c] / scale;
    }
}

}  // namespace fastmeta
