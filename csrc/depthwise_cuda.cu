// Depthwise convolution, and the gradient of its input, gathered from active neighbours.
#include "depthwise_tile.h"

namespace spark {
namespace {

constexpr int kWeightPitch = kSlice + 2;     // taps apart, so that the transposed copy below avoids most conflicts
constexpr int64_t kWeightBytes = 40 * 1024;  // what the general kernel keeps of them in shared memory
constexpr int kThreads = 256;

struct Pads {
  int y, x;
};

// weights[tap * kWeightPitch + c] <- weight [channels, taps], for the channels from `first` on; 0 beyond the last.
template <typename T>
__device__ void copy_weights(const T* weight, int64_t channels, int first, int taps, bool flipped, float* weights) {
  for (int i = threadIdx.x; i < kSlice * taps; i += blockDim.x) {
    const int c = i / taps, tap = i - c * taps;
    const float value = first + c < channels ? to_float(weight[static_cast<int64_t>(first) * taps + i]) : 0.0f;
    weights[(flipped ? taps - 1 - tap : tap) * kWeightPitch + c] = value;
  }
}

// A block computes tiles for one slice of channels. A warp computes S pixels of L lines of a patch at a time, so that
// each column that it loads serves up to S * L taps from registers.
template <typename T, int K, int Step, int S, int L>
__global__ void __launch_bounds__(kThreads, 2)
    gather_tiles(const T* source, const T* weight, const T* bias, T* query, Rows source_rows, Rows query_rows,
                 Tiling tiling, Layout layout, Pads pads, bool flipped) {
  SPARK_DYNAMIC_SHARED(unsigned char, memory);
  float* const weights = reinterpret_cast<float*>(memory);
  constexpr int kWeights = (K * K * kWeightPitch + 3) / 4 * 4;
  const Tile<T> tile(memory + kWeights * sizeof(float), tiling);
  const int first = blockIdx.y * kSlice, lane = threadIdx.x % 32;
  const int64_t c = first + kLaneChannels * lane;
  const int valid = layout.valid(c);
  const float2 start = bias ? load_two(bias + c, valid, layout.paired) : make_float2(0.0f, 0.0f);
  copy_weights(weight, layout.channels, first, K * K, flipped, weights);
  for (int number = blockIdx.x; number < tiling.tiles; number += gridDim.x) {
    const Corner corner(tiling, query_rows, number);
    const bool any =
        fill_tile(tiling, query_rows, source_rows, source, layout, first, Step, pads.y, pads.x, corner, tile);
    const int groups = any ? *tile.count * static_cast<int>(tiling.y.groups.divisor * tiling.x.groups.divisor) : 0;
    for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
      const Group group(tiling, tile, g, L, S);
      const T* const cells =
          tile.values + kLaneChannels * lane +
          ((group.patch.y + group.y) * Step * tiling.x.cells + (group.patch.x + group.x) * Step) * kSlice;
      float2 sum[L][S];
#pragma unroll
      for (int l = 0; l < L; ++l)
#pragma unroll
        for (int j = 0; j < S; ++j) sum[l][j] = start;
#pragma unroll 1
      for (int line = 0; line < (L - 1) * Step + K; ++line) {
        constexpr int kColumns = (S - 1) * Step + K;
        float2 column[kColumns];
#pragma unroll
        for (int p = 0; p < kColumns; ++p)
          column[p] = Pair<T>::unpack(
              *reinterpret_cast<const typename Pair<T>::Word*>(cells + (line * tiling.x.cells + p) * kSlice));
#pragma unroll
        for (int l = 0; l < L; ++l) {
          const int ky = line - l * Step;
          if (ky < 0 || ky >= K) continue;
          const float* const row = weights + ky * K * kWeightPitch + kLaneChannels * lane;
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
            const float2 w = *reinterpret_cast<const float2*>(row + kx * kWeightPitch);
#pragma unroll
            for (int j = 0; j < S; ++j) add_product(sum[l][j], column[j * Step + kx], w);
          }
        }
      }
      const int lines = pixels_left(group.y, corner.inside_y, tiling.y.part, query_rows.height.divisor, L);
      const int pixels = pixels_left(group.x, corner.inside_x, tiling.x.part, query_rows.width.divisor, S);
      T* const to = query + group.row(query_rows, corner) * layout.channels + c;
#pragma unroll
      for (int l = 0; l < L; ++l)
#pragma unroll
        for (int j = 0; j < S; ++j)
          if (l < lines && j < pixels)
            store_two(to + (l * static_cast<int>(query_rows.width.divisor) + j) * layout.channels, sum[l][j], valid,
                      layout.paired);
    }
    __syncthreads();
  }
}

// Any window. A warp computes one row of the query for one slice of channels, tap by tap.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    gather_rows(const T* source, const T* weight, const T* bias, T* query, Rows source_rows, Rows query_rows, int rows,
                Layout layout, Taps2d taps, bool weights_fit) {
  SPARK_DYNAMIC_SHARED(float, weights);
  const int first = blockIdx.y * kSlice, lane = threadIdx.x % 32, count = taps.y.count * taps.x.count;
  const int64_t c = first + kLaneChannels * lane;
  const int valid = layout.valid(c);
  const float2 start = bias ? load_two(bias + c, valid, layout.paired) : make_float2(0.0f, 0.0f);
  if (weights_fit) {
    copy_weights(weight, layout.channels, first, count, false, weights);
    __syncthreads();
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < rows; row += step) {
    const Place place = place_of(query_rows, static_cast<int>(row));
    float2 sum = start;
    for (int ky = 0; ky < taps.y.count; ++ky) {
      const int y = taps.y.source(place.y, ky);
      if (y < 0) continue;
      for (int kx = 0; kx < taps.x.count; ++kx) {
        const int from = source_rows.at(place.image, y, taps.x.source(place.x, kx));
        if (from < 0 || valid == 0) continue;
        const int tap = ky * taps.x.count + kx;
        float2 w;
        if (weights_fit)
          w = *reinterpret_cast<const float2*>(weights + tap * kWeightPitch + kLaneChannels * lane);
        else
          w = make_float2(to_float(weight[c * count + tap]),
                          valid > 1 ? to_float(weight[(c + 1) * count + tap]) : 0.0f);
        add_product(sum, load_two(source + from * layout.channels + c, valid, layout.paired), w);
      }
    }
    store_two(query + row * layout.channels + c, sum, valid, layout.paired);
  }
}

template <typename T, int K, int Step, int S>
void launch_tiles(Queue queue, const PatchMap& source_map, const PatchMap& query_map, const Layout& layout, Pads pads,
                  bool flipped, const T* source, const T* weight, const T* bias, T* query, const char* kernel) {
  constexpr int kLines = S == 1 ? 1 : 2;
  const int64_t weights = (K * K * kWeightPitch + 3) / 4 * 4 * sizeof(float);
  const Tiling tiling = choose_tiling<T>(query_map, K, Step, kLines, S, weights);
  const int64_t bytes = weights + Tile<T>::bytes(tiling);
  const int slices = layout.slices();
  const dim3 grid(static_cast<unsigned>(tile_blocks(tiling, slices)), static_cast<unsigned>(slices));
  const dim3 block(tiling.groups() >= 8 ? kThreads : kThreads / 2);
  const auto run = gather_tiles<T, K, Step, S, kLines>;
  allow_shared(run, bytes, kernel);
  SPARK_LAUNCH(run, grid, block, bytes, stream_of(queue), source, weight, bias, query, Rows(source_map),
               Rows(query_map), tiling, layout, pads, flipped);
}

template <typename T>
void launch_rows(Queue queue, const PatchMap& source_map, const PatchMap& query_map, const Window& window,
                 bool transposed, const Layout& layout, const T* source, const T* weight, const T* bias, T* query) {
  const int64_t bytes = window.taps() * kWeightPitch * static_cast<int64_t>(sizeof(float));
  const bool fit = bytes <= kWeightBytes;
  const int rows = static_cast<int>(query_map.rows());
  const int64_t blocks = TileAxis::up(rows, kThreads / 32);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, SPARK_MAX_BLOCKS)),
                  static_cast<unsigned>(layout.slices()));
  SPARK_LAUNCH(gather_rows<T>, grid, dim3(kThreads), fit ? bytes : 0, stream_of(queue), source, weight, bias, query,
               Rows(source_map), Rows(query_map), rows, layout, Taps2d(window, transposed), fit);
}

}  // namespace

void depthwise_gather(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                      const Window& window, bool transposed, int64_t channels, const void* source, const void* weight,
                      const void* bias, void* query) {
  const char* kernel = "depthwise_gather";
  check_geometry(source_map, query_map, window, kernel);
  if (channels <= 0 || query_map.patches == 0) return;
  with_type(type, kernel, [&](auto zero) {
    using T = decltype(zero);
    const Layout layout(channels, sizeof(T), {source, bias, query});
    const auto *from = static_cast<const T*>(source), *w = static_cast<const T*>(weight),
               *b = static_cast<const T*>(bias);
    auto* to = static_cast<T*>(query);
    const DeviceGuard guard(queue.device, kernel);
    const bool tiles = with_tile_window(window, transposed, [&](auto kernel_size, auto step) {
      constexpr int K = decltype(kernel_size)::value, kStep = decltype(step)::value;
      // The gradient of the input, too, is a convolution, with the taps turned round.
      const auto pad = [&](int64_t padding) { return static_cast<int>(transposed ? K - 1 - padding : padding); };
      with_segment<kStep>(segment_of(query_map.width, kStep), [&](auto segment) {
        launch_tiles<T, K, kStep, decltype(segment)::value>(queue, source_map, query_map, layout,
                                                            {pad(window.padding_y), pad(window.padding_x)}, transposed,
                                                            from, w, b, to, kernel);
      });
    });
    if (!tiles) launch_rows(queue, source_map, query_map, window, transposed, layout, from, w, b, to);
    check(cudaGetLastError(), kernel);
  });
}

}  // namespace spark
