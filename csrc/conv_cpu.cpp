// Convolution on packed rows: gather, GEMM and accumulation in one pass over the pairs that exist.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"


namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kBlockRows = 256;  // query rows whose accumulators stay in the cache
constexpr int64_t kPairChunk = 128;  // pairs per pass of grad_weight, so that their rows stay in the cache

template <typename T>
constexpr int64_t columns() {
  return 2 * Vector<T>::lanes;
}

// The pairs of one tap among query rows [begin, end).
struct Pairs {
  std::vector<Place> places;
  std::vector<int64_t> source;
  std::vector<int64_t> query;  // relative to begin
  int64_t count = 0;

  explicit Pairs(int64_t rows) : places(rows), source(rows), query(rows) {}

  void enter(const Geometry& g, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) places[row - begin] = place_of(g, row);
  }

  void find(const Geometry& g, int64_t rows, int64_t ky, int64_t kx) {
    count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = source_row(g, places[i], ky, kx);
      source[count] = row;
      query[count] = i;
      count += row >= 0;
    }
  }
};

// acc[m, :] += a[m][0..depth) times b (depth x columns), for M rows.
template <typename T, int M>
inline void tile(const T* const* a, int64_t depth, const T* b, T* const* acc) {
  typedef typename Vector<T>::type V;
  constexpr int L = Vector<T>::lanes;
  V sum[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    sum[m][0] = load(acc[m]);
    sum[m][1] = load(acc[m] + L);
  }
  for (int64_t k = 0; k < depth; ++k, b += 2 * L) {
    const V b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T value = a[m][k];
      sum[m][0] += value * b0;
      sum[m][1] += value * b1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    store(acc[m], sum[m][0]);
    store(acc[m] + L, sum[m][1]);
  }
}

template <typename T, int M = kTileRows>
inline void tile_of(int64_t rows, const T* const* a, int64_t depth, const T* b, T* const* acc) {
  if constexpr (M > 0) {
    if (rows == M)
      tile<T, M>(a, depth, b, acc);
    else
      tile_of<T, M - 1>(rows, a, depth, b, acc);
  }
}

// out[m, :] += sum over pairs of a[p][m] * b[p][:], for M of the source's channels.
template <typename T, int M>
inline void outer_tile(const T* const* a, const T* const* b, int64_t pairs, T* out) {
  typedef typename Vector<T>::type V;
  constexpr int L = Vector<T>::lanes;
  V sum[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    sum[m][0] = load(out + 2 * L * m);
    sum[m][1] = load(out + 2 * L * m + L);
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const V b0 = load(b[p]), b1 = load(b[p] + L);
    const T* row = a[p];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T value = row[m];
      sum[m][0] += value * b0;
      sum[m][1] += value * b1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    store(out + 2 * L * m, sum[m][0]);
    store(out + 2 * L * m + L, sum[m][1]);
  }
}

template <typename T, int M = kTileRows>
inline void outer_tile_of(int64_t rows, const T* const* a, const T* const* b, int64_t pairs, T* out) {
  if constexpr (M > 0) {
    if (rows == M)
      outer_tile<T, M>(a, b, pairs, out);
    else
      outer_tile_of<T, M - 1>(rows, a, b, pairs, out);
  }
}

struct Panels {
  int64_t depth, width, per_group, total;  // source and query channels per group; panels
  int64_t columns;

  Panels(const ConvShape& s, int64_t columns)
      : depth(s.source_channels / s.groups), width(s.query_channels / s.groups),
        per_group((width + columns - 1) / columns), total(per_group * s.groups), columns(columns) {}

  int64_t group(int64_t panel) const { return panel / per_group; }
  int64_t first(int64_t panel) const { return panel % per_group * columns; }  // first column, inside the group
  int64_t used(int64_t panel) const { return std::min(columns, width - first(panel)); }
};

}  // namespace

int64_t panel_columns(int64_t element_size) { return 2 * kVectorBytes / element_size; }

template <typename T>
void conv_gather_gemm(const Geometry& g, const ConvShape& s, const T* source, const T* packed, const T* bias, T* query,
                      int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
  const int64_t rows = g.rows(), blocks = (rows + kBlockRows - 1) / kBlockRows;
#pragma omp parallel num_threads(threads)
  {
    Pairs pairs(kBlockRows);
    std::vector<T> acc(kBlockRows * C);
    const T* a[kTileRows];
    T* out[kTileRows];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < panels.total * blocks; ++item) {
      const int64_t panel = item / blocks, begin = item % blocks * kBlockRows, end = std::min(rows, begin + kBlockRows);
      const int64_t group = panels.group(panel), used = panels.used(panel);
      const int64_t column = group * panels.width + panels.first(panel);
      const T* from = source + group * panels.depth;
      for (int64_t i = 0; i < end - begin; ++i)
        for (int64_t c = 0; c < C; ++c) acc[i * C + c] = bias && c < used ? bias[column + c] : T(0);
      pairs.enter(g, begin, end);
      const T* b = packed + panel * g.taps() * panels.depth * C;
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        for (int64_t kx = 0; kx < g.kw; ++kx, b += panels.depth * C) {
          pairs.find(g, end - begin, ky, kx);
          for (int64_t p = 0; p < pairs.count; p += kTileRows) {
            const int64_t m = std::min<int64_t>(kTileRows, pairs.count - p);
            for (int64_t i = 0; i < m; ++i) {
              a[i] = from + pairs.source[p + i] * s.source_channels;
              out[i] = acc.data() + pairs.query[p + i] * C;
            }
            tile_of<T>(m, a, panels.depth, b, out);
          }
        }
      }
      for (int64_t i = 0; i < end - begin; ++i)
        std::copy_n(acc.data() + i * C, used, query + (begin + i) * s.query_channels + column);
    }
  }
}

template <typename T>
void conv_grad_weight(const Geometry& g, const ConvShape& s, const T* source, const T* query, T* packed, int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
  const int64_t rows = g.rows(), taps = g.taps();
#pragma omp parallel num_threads(threads)
  {
    Pairs pairs(kPairChunk);
    std::vector<T> right(kPairChunk * C, T(0));  // the query's columns of this panel, padded
    const T* a[kPairChunk];
    const T* b[kPairChunk];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < panels.total * taps; ++item) {
      const int64_t panel = item / taps, tap = item % taps;
      const int64_t group = panels.group(panel), used = panels.used(panel);
      const T* from = source + group * panels.depth;
      const T* with = query + group * panels.width + panels.first(panel);
      T* out = packed + item * panels.depth * C;
      std::fill_n(out, panels.depth * C, T(0));
      for (int64_t begin = 0; begin < rows; begin += kPairChunk) {
        const int64_t end = std::min(rows, begin + kPairChunk);
        pairs.enter(g, begin, end);
        pairs.find(g, end - begin, tap / g.kw, tap % g.kw);
        for (int64_t p = 0; p < pairs.count; ++p) {
          b[p] = with + (begin + pairs.query[p]) * s.query_channels;
          if (used < C) b[p] = std::copy_n(b[p], used, right.data() + p * C) - used;
        }
        for (int64_t k = 0; k < panels.depth; k += kTileRows) {
          for (int64_t p = 0; p < pairs.count; ++p) a[p] = from + pairs.source[p] * s.source_channels + k;
          outer_tile_of<T>(std::min<int64_t>(kTileRows, panels.depth - k), a, b, pairs.count, out + k * C);
        }
      }
    }
  }
}

namespace {

// Visits (weight index, packed index) of each element, panel by panel; -1 as weight index for a panel's padding.
template <typename Visit>
void for_each_weight(const ConvShape& s, int64_t taps, int64_t columns, bool transposed, int threads, Visit visit) {
  constexpr int64_t kDepthBlock = 8;  // keeps the written part of a panel in the cache
  const Panels panels(s, columns);
  const int64_t inner = transposed ? panels.width : panels.depth;  // the weight's dimension 1
  const int64_t depth_step = transposed ? inner * taps : taps, column_step = transposed ? taps : inner * taps;
  const int64_t group_step = panels.depth * panels.width * taps;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t panel = 0; panel < panels.total; ++panel) {
    for (int64_t block = 0; block < (panels.depth + kDepthBlock - 1) / kDepthBlock; ++block) {
      const int64_t begin = block * kDepthBlock, end = std::min(panels.depth, begin + kDepthBlock);
      const int64_t from = panels.group(panel) * group_step + panels.first(panel) * column_step;
      const int64_t to = panel * taps * panels.depth * columns;
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t k = begin; k < end; ++k)
          for (int64_t t = 0; t < taps; ++t)
            visit(c < panels.used(panel) ? from + k * depth_step + c * column_step + t : -1,
                  to + (t * panels.depth + k) * columns + c);
    }
  }
}

}  // namespace

template <typename T>
void pack_weight(const ConvShape& s, int64_t taps, bool transposed, const T* weight, T* packed, int threads) {
  for_each_weight(s, taps, columns<T>(), transposed, threads,
                  [=](int64_t from, int64_t to) { packed[to] = from < 0 ? T(0) : weight[from]; });
}

template <typename T>
void unpack_weight(const ConvShape& s, int64_t taps, const T* packed, T* weight, int threads) {
  for_each_weight(s, taps, columns<T>(), false, threads, [=](int64_t to, int64_t from) {
    if (to >= 0) weight[to] = packed[from];
  });
}

#define SPARK_INSTANTIATE(T)                                                                                      \
  template void conv_gather_gemm<T>(const Geometry&, const ConvShape&, const T*, const T*, const T*, T*, int);    \
  template void conv_grad_weight<T>(const Geometry&, const ConvShape&, const T*, const T*, T*, int);              \
  template void pack_weight<T>(const ConvShape&, int64_t, bool, const T*, T*, int);                               \
  template void unpack_weight<T>(const ConvShape&, int64_t, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
