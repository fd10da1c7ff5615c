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

// The same by sums of one number each: rows first, first + step, ... of column c, and the entries of
// a pixel (a W + c, sorted by pixel), from read(place in the image) and read(place in the sinogram).
template <class N, class Read>
FM_HOST_DEVICE N project_column(const int32_t* pixels, int64_t size, int64_t c, int64_t first,
                                int64_t step, Read&& read) {
  N sum{};
  for (int64_t r = first; r < size; r += step) {
    const int32_t k = pixels[r * size + c];
    if (k >= 0) sum = sum + read(k);
  }
  return sum;
}
template <class N, class Read>
FM_HOST_DEVICE N project_pixel_adjoint(const int32_t* order, int64_t first, int64_t last,
                                       int64_t step, Read&& read) {
  N sum{};
  for (int64_t i = first; i < last; i += step) sum = sum + read(order[i]);
  return sum;
}

}  // namespace fastmeta
