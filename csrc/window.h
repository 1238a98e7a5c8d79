// Which source row a query row reads at a tap: arithmetic per axis, plus one look-up in the grid of patches.
// The tables are made in spark_fast/ops/window.py; forward and transposed (gradient) gathers differ only in them.
#pragma once

#include <cstdint>

namespace spark {

constexpr int32_t kMasked = -1;   // inside the image, not active
constexpr int32_t kOutside = -2;  // beyond the border, or no output reads this pixel through this tap

struct Axis {
  const int32_t* grid;  // [taps, length] grid coordinate of the source, kOutside where there is none
  const int32_t* in;    // [taps, length] offset inside that patch
  int64_t length;       // query coordinates along this axis
};

// Pixels of one patch of a map: its rows are patch-major, row-major inside a patch.
struct PatchSize {
  int64_t height, width;

  int64_t area() const { return height * width; }
};

struct Geometry {
  const int32_t* coords;  // [patches, 3] image, grid row, grid column of the query's patches
  int64_t patches;        // of the query
  PatchSize query, source;
  const int32_t* grid_to_patch;  // [B, gh, gw] of the source
  int64_t gh, gw;
  int64_t kh, kw;
  Axis y, x;

  int64_t taps() const { return kh * kw; }
  int64_t rows() const { return patches * query.area(); }
};

// A query row's place: its coordinates in the image and the image's part of grid_to_patch.
struct Place {
  int32_t y, x;
  const int32_t* grid;
};

inline Place place_of(const Geometry& g, int64_t row) {
  const int64_t patch = row / g.query.area();
  const int32_t pixel = static_cast<int32_t>(row % g.query.area()), width = static_cast<int32_t>(g.query.width);
  const int32_t* c = g.coords + 3 * patch;
  return {static_cast<int32_t>(c[1] * g.query.height + pixel / width),
          static_cast<int32_t>(c[2] * g.query.width + pixel % width), g.grid_to_patch + c[0] * g.gh * g.gw};
}

// Source row read by `p` at tap (ky, kx), or kMasked / kOutside.
inline int64_t source_row(const Geometry& g, const Place& p, int64_t ky, int64_t kx) {
  const int64_t iy = ky * g.y.length + p.y, ix = kx * g.x.length + p.x;
  const int32_t gy = g.y.grid[iy], gx = g.x.grid[ix];
  if (gy < 0 || gx < 0) return kOutside;
  const int64_t patch = p.grid[gy * g.gw + gx];
  if (patch < 0) return kMasked;
  return (patch * g.source.height + g.y.in[iy]) * g.source.width + g.x.in[ix];
}

}  // namespace spark
