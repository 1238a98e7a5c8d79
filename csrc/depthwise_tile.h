// What the depthwise kernels for square windows of dilation 1 share. A block holds the source pixels that a tile of the
// query reads, halo and all, for 64 channels in shared memory, 0 where masked or beyond the border. The lanes of a warp
// are channels, two each: neighbours, masks and borders are the same for all of them, and no two read the same bank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda_launch.h"
#include "cuda_types.h"
#include "window_cuda.h"

namespace spark {

constexpr int kLaneChannels = 2, kSlice = 32 * kLaneChannels;
constexpr int kTileBlocks = 1056;          // in a launch, at most: 8 for each of an H100's multiprocessors
constexpr int64_t kTileBytes = 96 * 1024;  // of shared memory in a block, at most; GPUs of sm_80 and later have more

// How a tensor [rows, channels] can be read: two values, or 16 bytes, as one.
struct Layout {
  int64_t channels;
  bool paired, wide;

  Layout(int64_t channels, int64_t element_size, std::initializer_list<const void*> tensors)
      : channels(channels), paired(channels % 2 == 0), wide(channels * element_size % 16 == 0) {
    for (const void* tensor : tensors) {
      paired &= is_aligned(tensor, 2 * element_size);
      wide &= is_aligned(tensor, 16);
    }
  }

  int slices() const { return static_cast<int>((channels + kSlice - 1) / kSlice); }

  // How many of the channels from c on, of two, exist.
  __device__ __forceinline__ int valid(int64_t c) const {
    return channels - c >= 2 ? 2 : channels - c > 0 ? static_cast<int>(channels - c) : 0;
  }
};

// Along one axis: a tile covers several whole patches where they are small, else a part of one.
struct TileAxis {
  int patches, part;          // of a tile: how many, and pixels of each
  Divider per_patch, groups;  // of a patch: tiles; of a part: groups of pixels that are computed together
  int cells;                  // source pixels that a tile reads

  TileAxis(int64_t size, int64_t grid, int target, int group, int step, int kernel)
      : patches(static_cast<int>(std::clamp<int64_t>(target / size, 1, grid))),
        part(static_cast<int>(std::min<int64_t>(size, target))), per_patch(up(size, part)), groups(up(part, group)),
        cells(static_cast<int>(((patches - 1) * size + groups.divisor * group - 1) * step + kernel)) {}

  static int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }
};

struct Tiling {
  TileAxis y, x;
  bool one_patch;            // a tile lies in one active patch, else it is a rectangle of an image
  Divider tiles_y, tiles_x;  // of a patch, or of an image
  int64_t tiles;

  Tiling(const PatchMap& query, int target, int lines, int segment, int step, int kernel)
      : y(query.height, query.gh, target, lines, step, kernel), x(query.width, query.gw, target, segment, step, kernel),
        one_patch(y.patches * x.patches == 1), tiles_y(along(y, one_patch, query.gh)),
        tiles_x(along(x, one_patch, query.gw)),
        tiles((one_patch ? query.patches : query.batch) * tiles_y.divisor * tiles_x.divisor) {}

  static int64_t along(const TileAxis& axis, bool one_patch, int64_t grid) {
    return axis.per_patch.divisor * (one_patch ? 1 : TileAxis::up(grid, axis.patches));
  }

  int cells() const { return y.cells * x.cells; }
  int most_patches() const { return y.patches * x.patches; }
  // Groups of pixels that a block with this tile can expect, less than half of the patches being active.
  int groups() const { return std::max(1, most_patches() / 2) * static_cast<int>(y.groups.divisor * x.groups.divisor); }
};

// An active patch of a tile, and the tile's pixel where it begins.
struct ActivePatch {
  int number;
  int16_t y, x;
};

// A tile in shared memory.
template <typename T>
struct Tile {
  T* values;             // [cells, kSlice]
  int* rows;             // [cells]: the source row, negative where the values are 0
  ActivePatch* patches;  // [most_patches]
  int* count;            // of active patches

  static int64_t bytes(const Tiling& tiling) {
    return tiling.cells() * (kSlice * static_cast<int64_t>(sizeof(T)) + 4) + tiling.most_patches() * 8 + 4 + 8;
  }

  // In `memory`, aligned to 16 bytes.
  __device__ Tile(unsigned char* memory, const Tiling& tiling)
      : values(reinterpret_cast<T*>(memory)),
        rows(reinterpret_cast<int*>(values + tiling.y.cells * tiling.x.cells * kSlice)),
        patches(reinterpret_cast<ActivePatch*>(rows + (tiling.y.cells * tiling.x.cells + 1) / 2 * 2)),
        count(reinterpret_cast<int*>(patches + tiling.y.patches * tiling.x.patches)) {}
};

// Where a tile begins.
struct Corner {
  int image, grid_y, grid_x, inside_y, inside_x;  // first patch, and the first pixel inside it

  __device__ Corner(const Tiling& tiling, const Rows& query, int tile) {
    const int line = tiling.tiles_x.quotient(tile), column = tile - line * static_cast<int>(tiling.tiles_x.divisor);
    const int which = tiling.tiles_y.quotient(line), row = line - which * static_cast<int>(tiling.tiles_y.divisor);
    const int patch_y = tiling.y.per_patch.quotient(row), patch_x = tiling.x.per_patch.quotient(column);
    inside_y = (row - patch_y * static_cast<int>(tiling.y.per_patch.divisor)) * tiling.y.part;
    inside_x = (column - patch_x * static_cast<int>(tiling.x.per_patch.divisor)) * tiling.x.part;
    const int32_t* coords = query.coords + 3 * static_cast<int64_t>(which);
    image = tiling.one_patch ? coords[0] : which;
    grid_y = tiling.one_patch ? coords[1] : patch_y * tiling.y.patches;
    grid_x = tiling.one_patch ? coords[2] : patch_x * tiling.x.patches;
  }
};

// Lists the tile's active patches in order. For one warp.
template <typename T>
__device__ void list_patches(const Tiling& tiling, const Rows& query, const Corner& corner, const Tile<T>& tile) {
  const int lane = threadIdx.x % 32, most = tiling.y.patches * tiling.x.patches;
  int count = 0;
  for (int first = 0; first < most; first += 32) {
    const int y = (first + lane) / tiling.x.patches, x = first + lane - y * tiling.x.patches;
    const int grid_y = corner.grid_y + y, grid_x = corner.grid_x + x;
    const bool exists = first + lane < most && grid_y < query.gh && grid_x < query.gw;
    const int number = exists ? query.grid_to_patch[(corner.image * query.gh + grid_y) * query.gw + grid_x] : -1;
    const unsigned active = __ballot_sync(0xFFFFFFFFu, number >= 0);
    if (number >= 0)
      tile.patches[count + __popc(active & ((1u << lane) - 1))] = {
          number, static_cast<int16_t>(y * static_cast<int>(query.height.divisor)),
          static_cast<int16_t>(x * static_cast<int>(query.width.divisor))};
    count += __popc(active);
  }
  if (lane == 0) *tile.count = count;
}

// Fills a tile with the channels from `first` on. All threads of the block call it; they may read what it wrote after
// it, and must be past a barrier before it is called again. False, and nothing filled, if no patch is active.
template <typename T>
__device__ bool fill_tile(const Tiling& tiling, const Rows& query, const Rows& source_rows,
                          const T* __restrict__ source, const Layout& layout, int first, int step, int padding_y,
                          int padding_x, const Corner& corner, const Tile<T>& tile) {
  const int threads = blockDim.x, cells = tiling.y.cells * tiling.x.cells;
  if (threadIdx.x < 32) list_patches(tiling, query, corner, tile);
  const int top = (corner.grid_y * static_cast<int>(query.height.divisor) + corner.inside_y) * step - padding_y;
  const int left = (corner.grid_x * static_cast<int>(query.width.divisor) + corner.inside_x) * step - padding_x;
  for (int cell = threadIdx.x; cell < cells; cell += threads) {
    const int y = cell / tiling.x.cells;
    tile.rows[cell] = source_rows.at(corner.image, top + y, left + cell - y * tiling.x.cells);
  }
  __syncthreads();
  if (*tile.count == 0) return false;
  if (layout.wide) {
    constexpr int kValues = 16 / sizeof(T), kChunks = kSlice / kValues;
#pragma unroll 4
    for (int i = threadIdx.x; i < cells * kChunks; i += threads) {
      const int row = tile.rows[i / kChunks];
      const int64_t c = first + i % kChunks * kValues;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (row >= 0 && c < layout.channels)
        values = __ldg(reinterpret_cast<const uint4*>(source + row * layout.channels + c));
      reinterpret_cast<uint4*>(tile.values)[i] = values;
    }
  } else {
    for (int i = threadIdx.x; i < cells * kSlice; i += threads) {
      const int row = tile.rows[i / kSlice];
      const int64_t c = first + i % kSlice;
      tile.values[i] = row >= 0 && c < layout.channels ? source[row * layout.channels + c] : from_float<T>(0.0f);
    }
  }
  __syncthreads();
  return true;
}

// Pixels of a patch that a warp computes together: the first of them, in the tile and in the patch.
struct Group {
  ActivePatch patch;
  int y, x;  // of the patch's part

  template <typename T>
  __device__ __forceinline__ Group(const Tiling& tiling, const Tile<T>& tile, int group, int lines, int segment) {
    const int line = tiling.x.groups.quotient(group);
    const int which = tiling.y.groups.quotient(line);
    patch = tile.patches[which];
    y = (line - which * static_cast<int>(tiling.y.groups.divisor)) * lines;
    x = (group - line * static_cast<int>(tiling.x.groups.divisor)) * segment;
  }

  // The query row of the patch's pixel (y, x) of the part, whose first pixel is the corner's.
  __device__ __forceinline__ int row(const Rows& query, const Corner& corner) const {
    const int height = static_cast<int>(query.height.divisor), width = static_cast<int>(query.width.divisor);
    return (patch.number * height + corner.inside_y + y) * width + corner.inside_x + x;
  }
};

// How many of the pixels from `at` on, of `most`, belong to a part that begins `inside` a patch of `size` pixels.
__device__ __forceinline__ int pixels_left(int at, int inside, int part, int size, int most) {
  return min(most, min(part, size - inside) - at);
}

// Pixels that a warp computes together: segments of a line, which a patch's width should fill by three quarters.
inline int segment_of(int64_t width, int step) {
  for (int segment : {8, 4, 2})
    if ((step == 1 || segment == 4) && 3 * TileAxis::up(width, segment) * segment <= 4 * width) return segment;
  return 1;
}

// The largest tile that fits: 16 pixels, or one patch of 8 to 16.
template <typename T>
Tiling choose_tiling(const PatchMap& query, int kernel, int step, int lines, int segment, int64_t other_bytes) {
  const int64_t side = std::max(query.height, query.width);
  for (int target = side >= 8 && side < 16 ? static_cast<int>(side) : 16;; target /= 2) {
    const Tiling tiling(query, target, lines, segment, step, kernel);
    if (target == 1 || Tile<T>::bytes(tiling) + other_bytes <= kTileBytes) return tiling;
  }
}

// Blocks in x for a grid of `slices` blocks in y: each computes several tiles, and shares one copy of the weights.
inline int64_t tile_blocks(const Tiling& tiling, int slices) {
  const int64_t most = std::min<int64_t>(std::max(1, kTileBlocks / slices), SPARK_MAX_BLOCKS);
  return std::max<int64_t>(1, std::min(tiling.tiles, most));
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls run(kernel size, step) as constants for a square window of 3, 5 or 7 with dilation 1, and stride 1 or, if not
// transposed, 2. False for others.
template <typename Run>
bool with_tile_window(const Window& w, bool transposed, Run run) {
  const int64_t stride = w.stride_y;
  if (w.kernel_y != w.kernel_x || stride != w.stride_x || stride > (transposed ? 1 : 2)) return false;
  if (w.dilation_y != 1 || w.dilation_x != 1) return false;
  const auto with_step = [&](auto kernel_size) {
    if (stride == 1)
      run(kernel_size, Constant<1>{});
    else
      run(kernel_size, Constant<2>{});
    return true;
  };
  switch (w.kernel_y) {
    case 3: return with_step(Constant<3>{});
    case 5: return with_step(Constant<5>{});
    case 7: return with_step(Constant<7>{});
  }
  return false;
}

// Calls run(segment) as a constant; the segments are those of segment_of.
template <int Step, typename Run>
void with_segment(int segment, Run run) {
  if constexpr (Step == 1) {
    if (segment == 8) return run(Constant<8>{});
    if (segment == 2) return run(Constant<2>{});
  }
  if (segment == 4) return run(Constant<4>{});
  run(Constant<1>{});
}

}  // namespace spark
