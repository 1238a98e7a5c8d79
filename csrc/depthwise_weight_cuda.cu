// The gradient of a depthwise convolution's weight: each block sums a part of the batch, then the parts are added in
// order, so that the result is the same in every run.
#include "depthwise_tile.h"

namespace spark {
namespace {

constexpr int kRowThreads = 256, kRowsPerPart = 256, kRowParts = 128;
constexpr int kPartsTogether = 16;

struct Pads {
  int y, x;
};

// sums[blockIdx.x] <- the sums of this block's tiles, for one slice of channels. Warp ky sums row ky of the kernel: a
// segment of S pixels' gradients stays in registers while the columns that it was computed from pass by.
template <typename T, int K, int Step, int S>
__global__ void __launch_bounds__(32 * K, 24 / K)
    sum_tiles(const T* source, const T* query, float* sums, Rows source_rows, Rows query_rows, Tiling tiling,
              Layout layout, Pads pads) {
  SPARK_DYNAMIC_SHARED(unsigned char, memory);
  const Tile<T> tile(memory, tiling);
  const int first = blockIdx.y * kSlice, lane = threadIdx.x % 32, ky = threadIdx.x / 32;
  const int64_t c = first + kLaneChannels * lane;
  const int valid = layout.valid(c);
  float2 sum[K];
#pragma unroll
  for (int kx = 0; kx < K; ++kx) sum[kx] = make_float2(0.0f, 0.0f);
  for (int number = blockIdx.x; number < tiling.tiles; number += gridDim.x) {
    const Corner corner(tiling, query_rows, number);
    const bool any =
        fill_tile(tiling, query_rows, source_rows, source, layout, first, Step, pads.y, pads.x, corner, tile);
    const int groups = any ? *tile.count * static_cast<int>(tiling.y.groups.divisor * tiling.x.groups.divisor) : 0;
    for (int g = 0; g < groups; ++g) {
      const Group group(tiling, tile, g, 1, S);
      const int pixels = pixels_left(group.x, corner.inside_x, tiling.x.part, query_rows.width.divisor, S);
      if (pixels_left(group.y, corner.inside_y, tiling.y.part, query_rows.height.divisor, 1) <= 0) continue;
      const T* const gradients = query + group.row(query_rows, corner) * layout.channels + c;
      const int line = (group.patch.y + group.y) * Step + ky, left = (group.patch.x + group.x) * Step;
      const T* const cells = tile.values + (line * tiling.x.cells + left) * kSlice + kLaneChannels * lane;
      float2 gradient[S];
#pragma unroll
      for (int j = 0; j < S; ++j)
        gradient[j] = load_two(gradients + j * layout.channels, j < pixels ? valid : 0, layout.paired);
#pragma unroll
      for (int p = 0; p < (S - 1) * Step + K; ++p) {
        const float2 column = Pair<T>::unpack(*reinterpret_cast<const typename Pair<T>::Word*>(cells + p * kSlice));
#pragma unroll
        for (int j = 0; j < S; ++j)
          if (p - j * Step >= 0 && p - j * Step < K) add_product(sum[p - j * Step], column, gradient[j]);
      }
    }
    __syncthreads();
  }
  float* const to = sums + (static_cast<int64_t>(blockIdx.x) * K * K + ky * K) * layout.channels + c;
#pragma unroll
  for (int kx = 0; kx < K; ++kx) store_two(to + kx * layout.channels, sum[kx], valid, false);
}

// Any window: a block sums one tap over every gridDim.x-th group of rows.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) sum_rows(const T* source, const T* query, float* sums, Rows source_rows,
                                                        Rows query_rows, int rows, Layout layout, Taps2d taps) {
  constexpr int kWarps = kRowThreads / 32;
  SPARK_SHARED(float2, of_warps, [kWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.z) * kSlice + kLaneChannels * lane;
  const int tap = blockIdx.y, ky = tap / taps.x.count, kx = tap - ky * taps.x.count, valid = layout.valid(c);
  float2 sum = make_float2(0.0f, 0.0f);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < rows; row += gridDim.x * kWarps) {
    const Place place = place_of(query_rows, static_cast<int>(row));
    const int from = source_rows.at(place.image, taps.y.source(place.y, ky), taps.x.source(place.x, kx));
    if (from >= 0)
      add_product(sum, load_two(source + from * layout.channels + c, valid, layout.paired),
                  load_two(query + row * layout.channels + c, valid, layout.paired));
  }
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < kWarps; ++other) {
    sum.x += of_warps[other][lane].x;
    sum.y += of_warps[other][lane].y;
  }
  const int64_t count = taps.y.count * taps.x.count;
  store_two(sums + (blockIdx.x * count + tap) * layout.channels + c, sum, valid, false);
}

// weight[c, tap] <- the sum of all parts, for 32 channels of one tap. Threads of one y add every 16th part.
template <typename T>
__global__ void __launch_bounds__(32 * kPartsTogether)
    add_parts(const float* sums, int64_t parts, int64_t channels, T* weight) {
  SPARK_SHARED(float, together, [kPartsTogether][32]);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x, tap = blockIdx.y, taps = gridDim.y;
  float sum = 0;
#pragma unroll 4
  for (int64_t part = threadIdx.y; part < parts; part += kPartsTogether)
    if (c < channels) sum += sums[(part * taps + tap) * channels + c];
  together[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int other = 1; other < kPartsTogether; ++other) sum += together[other][threadIdx.x];
  weight[c * taps + tap] = from_float<T>(sum);
}

template <typename T>
Tiling tiling_of(const PatchMap& query_map, int kernel, int step) {
  return choose_tiling<T>(query_map, kernel, step, 1, segment_of(query_map.width, step), 0);
}

template <typename T, int K, int Step, int S>
void launch_tiles(Queue queue, const PatchMap& source_map, const PatchMap& query_map, const Layout& layout, Pads pads,
                  const T* source, const T* query, float* sums, int64_t parts, const char* kernel) {
  const Tiling tiling = tiling_of<T>(query_map, K, Step);
  const int64_t bytes = Tile<T>::bytes(tiling);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(layout.slices()));
  const auto run = sum_tiles<T, K, Step, S>;
  allow_shared(run, bytes, kernel);
  SPARK_LAUNCH(run, grid, dim3(32 * K), bytes, stream_of(queue), source, query, sums, Rows(source_map), Rows(query_map),
               tiling, layout, pads);
}

}  // namespace

int64_t depthwise_parts(FloatType type, const PatchMap& source_map, const PatchMap& query_map, const Window& window,
                        int64_t channels) {
  const char* kernel = "depthwise_grad_weight";
  check_geometry(source_map, query_map, window, kernel);
  if (channels <= 0 || query_map.patches == 0) return 0;
  int64_t parts = 0;
  with_type(type, kernel, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout(channels, sizeof(T), {});
    const bool tiles = with_tile_window(window, false, [&](auto kernel_size, auto step) {
      parts =
          tile_blocks(tiling_of<T>(query_map, decltype(kernel_size)::value, decltype(step)::value), layout.slices());
    });
    if (!tiles) parts = std::min<int64_t>({TileAxis::up(query_map.rows(), kRowsPerPart), kRowParts, SPARK_MAX_BLOCKS});
  });
  return parts;
}

void depthwise_grad_weight(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                           const Window& window, int64_t channels, const void* source, const void* query, float* sums,
                           int64_t parts, void* weight) {
  const char* kernel = "depthwise_grad_weight";
  if (parts != depthwise_parts(type, source_map, query_map, window, channels))
    throw std::invalid_argument(std::string(kernel) + ": the number of parts is not that of depthwise_parts");
  if (channels <= 0) return;
  with_type(type, kernel, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout(channels, sizeof(T), {source, query});
    const auto *from = static_cast<const T*>(source), *gradient = static_cast<const T*>(query);
    const DeviceGuard guard(queue.device, kernel);
    const bool tiles = parts && with_tile_window(window, false, [&](auto kernel_size, auto step) {
                         constexpr int K = decltype(kernel_size)::value, kStep = decltype(step)::value;
                         with_segment<kStep>(segment_of(query_map.width, kStep), [&](auto segment) {
                           launch_tiles<T, K, kStep, decltype(segment)::value>(queue, source_map, query_map, layout,
                                                                               {static_cast<int>(window.padding_y),
                                                                                static_cast<int>(window.padding_x)},
                                                                               from, gradient, sums, parts, kernel);
                         });
                       });
    if (parts && !tiles) {
      const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(window.taps()),
                      static_cast<unsigned>(layout.slices()));
      SPARK_LAUNCH(sum_rows<T>, grid, dim3(kRowThreads), 0, stream_of(queue), from, gradient, sums, Rows(source_map),
                   Rows(query_map), static_cast<int>(query_map.rows()), layout, Taps2d(window, false));
    }
    check(cudaGetLastError(), kernel);
    const dim3 grid(static_cast<unsigned>(TileAxis::up(channels, 32)), static_cast<unsigned>(window.taps()));
    SPARK_LAUNCH(add_parts<T>, grid, dim3(32, kPartsTogether), 0, stream_of(queue), sums, parts, channels,
                 static_cast<T*>(weight));
    check(cudaGetLastError(), kernel);
  });
}

}  // namespace spark
