// The taps of a row that have a source, found through lists of each coordinate's taps inside the image.
#pragma once

#include <cstdint>
#include <vector>

#include "simd.h"
#include "window.h"

namespace spark {
namespace SPARK_ISA {

class AxisTaps {
 public:
  struct Tap {
    int32_t tap, grid, in;
  };

  AxisTaps(const Axis& axis, int64_t taps) : most_(taps), taps_(axis.length * taps), count_(axis.length) {
    for (int64_t q = 0; q < axis.length; ++q)
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t at = k * axis.length + q;
        if (axis.grid[at] >= 0) taps_[q * taps + count_[q]++] = {static_cast<int32_t>(k), axis.grid[at], axis.in[at]};
      }
  }

  const Tap* begin(int64_t q) const { return taps_.data() + q * most_; }
  const Tap* end(int64_t q) const { return begin(q) + count_[q]; }

 private:
  int64_t most_;
  std::vector<Tap> taps_;
  std::vector<int64_t> count_;
};

class Neighbours {
 public:
  explicit Neighbours(const Geometry& g) : g_(g), y_(g.y, g.kh), x_(g.x, g.kw) {}

  // Calls visit(source row, active, tap) for each tap inside the image; of a masked one the row means nothing.
  template <typename Visit>
  void each(const Place& place, Visit visit) const {
    for (const AxisTaps::Tap* y = y_.begin(place.y); y != y_.end(place.y); ++y) {
      const int32_t* const patches = place.grid + y->grid * g_.gw;
      for (const AxisTaps::Tap* x = x_.begin(place.x); x != x_.end(place.x); ++x) {
        const int64_t patch = patches[x->grid];
        visit((patch * g_.source.height + y->in) * g_.source.width + x->in, patch >= 0, y->tap * g_.kw + x->tap);
      }
    }
  }

 private:
  const Geometry& g_;
  AxisTaps y_, x_;
};

}  // namespace SPARK_ISA
}  // namespace spark
