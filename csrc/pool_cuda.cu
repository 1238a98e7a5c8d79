// Max pooling on packed rows. A masked neighbour counts as 0, as on a zero-filled map; beyond the border is -infinity.
#include "cuda_launch.h"
#include "cuda_types.h"
#include "window_cuda.h"

namespace spark {
namespace {

template <typename T, int V>
struct alignas(V * sizeof(T)) Values {
  T of[V];
};

// Threads of one y share a row of the query; each has V neighbouring channels. NaN wins; of equal values the first tap.
template <typename T, int V>
__global__ void __launch_bounds__(256, 4) take_highest(const T* source, T* query, int16_t* argmax, Rows source_rows,
                                                       Rows query_rows, int rows, Taps2d taps, int64_t channels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    const Place place = place_of(query_rows, static_cast<int>(row));
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < channels; c += static_cast<int64_t>(blockDim.x) * V) {
      float high[V];
      Values<int16_t, V> which;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        high[v] = -INFINITY;
        which.of[v] = -1;
      }
      for (int ky = 0; ky < taps.y.count; ++ky)
        for (int kx = 0; kx < taps.x.count; ++kx) {
          const int from = source_rows.at(place.image, taps.y.source(place.y, ky), taps.x.source(place.x, kx));
          if (from == kOutside) continue;
          Values<T, V> values;
          if (from >= 0) values = *reinterpret_cast<const Values<T, V>*>(source + from * channels + c);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float value = from >= 0 ? to_float(values.of[v]) : 0.0f;
            if (!(value > high[v] || value != value || which.of[v] < 0)) continue;
            high[v] = value;
            which.of[v] = static_cast<int16_t>(ky * taps.x.count + kx);
          }
        }
      Values<T, V> best;
#pragma unroll
      for (int v = 0; v < V; ++v) best.of[v] = from_float<T>(high[v]);
      *reinterpret_cast<Values<T, V>*>(query + row * channels + c) = best;
      *reinterpret_cast<Values<int16_t, V>*>(argmax + row * channels + c) = which;
    }
  }
}

// The same with the roles turned round: the query is the pooled map, the source its maxima's gradients.
template <typename T, int V>
__global__ void __launch_bounds__(256, 4) sum_taken(const T* source, const int16_t* argmax, T* query, Rows source_rows,
                                                    Rows query_rows, int rows, Taps2d taps, int64_t channels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    const Place place = place_of(query_rows, static_cast<int>(row));
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < channels; c += static_cast<int64_t>(blockDim.x) * V) {
      float sum[V];
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = 0.0f;
      for (int ky = 0; ky < taps.y.count; ++ky) {
        const int y = taps.y.source(place.y, ky);
        if (y < 0) continue;
        for (int kx = 0; kx < taps.x.count; ++kx) {
          const int from = source_rows.at(place.image, y, taps.x.source(place.x, kx));
          if (from < 0) continue;
          const auto values = *reinterpret_cast<const Values<T, V>*>(source + from * channels + c);
          const auto which = *reinterpret_cast<const Values<int16_t, V>*>(argmax + from * channels + c);
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (which.of[v] == ky * taps.x.count + kx) sum[v] += to_float(values.of[v]);
        }
      }
      Values<T, V> all;
#pragma unroll
      for (int v = 0; v < V; ++v) all.of[v] = from_float<T>(sum[v]);
      *reinterpret_cast<Values<T, V>*>(query + row * channels + c) = all;
    }
  }
}

// Calls run(T{}, number of channels of a thread) for `channels` and addresses as they are.
template <typename Run>
void with_values(FloatType type, const char* kernel, int64_t channels, std::initializer_list<const void*> values,
                 const int16_t* argmax, Run run) {
  with_type(type, kernel, [&](auto zero) {
    bool four = channels % 4 == 0 && is_aligned(argmax, 4 * sizeof(int16_t));
    for (const void* tensor : values) four &= is_aligned(tensor, 4 * sizeof(zero));
    if (four)
      run(zero, std::integral_constant<int, 4>{});
    else
      run(zero, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void max_pool_forward(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                      const Window& window, int64_t channels, const void* source, void* query, int16_t* argmax) {
  const char* kernel = "max_pool_forward";
  check_geometry(source_map, query_map, window, kernel);
  const int64_t rows = query_map.rows();
  if (rows == 0 || channels <= 0) return;
  with_values(type, kernel, channels, {source, query}, argmax, [&](auto zero, auto together) {
    using T = decltype(zero);
    constexpr int V = decltype(together)::value;
    const DeviceGuard guard(queue.device, kernel);
    const RowLaunch shape(rows, channels / V);
    const auto run = take_highest<T, V>;
    SPARK_LAUNCH(run, shape.grid, shape.block, 0, stream_of(queue), static_cast<const T*>(source),
                 static_cast<T*>(query), argmax, Rows(source_map), Rows(query_map), static_cast<int>(rows),
                 Taps2d(window, false), channels);
    check(cudaGetLastError(), kernel);
  });
}

void max_pool_grad_input(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                         const Window& window, int64_t channels, const void* source, const int16_t* argmax,
                         void* query) {
  const char* kernel = "max_pool_grad_input";
  check_geometry(source_map, query_map, window, kernel);
  const int64_t rows = query_map.rows();
  if (rows == 0 || channels <= 0) return;
  with_values(type, kernel, channels, {source, query}, argmax, [&](auto zero, auto together) {
    using T = decltype(zero);
    constexpr int V = decltype(together)::value;
    const DeviceGuard guard(queue.device, kernel);
    const RowLaunch shape(rows, channels / V);
    const auto run = sum_taken<T, V>;
    SPARK_LAUNCH(run, shape.grid, shape.block, 0, stream_of(queue), static_cast<const T*>(source), argmax,
                 static_cast<T*>(query), Rows(source_map), Rows(query_map), static_cast<int>(rows),
                 Taps2d(window, true), channels);
    check(cudaGetLastError(), kernel);
  });
}

}  // namespace spark
