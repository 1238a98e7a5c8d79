// Convolution on packed rows: gather, GEMM and accumulation in one pass over the pairs that exist.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kBlockRows = 256;  // query rows whose accumulators stay in the cache
constexpr int64_t kFewChannels = 8;  // up to here the taps of a row are unfolded into one long row
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

  void all(int64_t rows) {
    count = rows;
    for (int64_t i = 0; i < rows; ++i) query[i] = i;
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

// The values that query rows [begin, end) read through taps [first, last), as (rows, taps * depth), 0 where there is
// none. For few channels: the taps then share one long GEMM instead of many short ones.
template <typename T>
void unfold(const Geometry& g, const Pairs& at, int64_t rows, int64_t ky_begin, int64_t ky_end, const T* source,
            int64_t stride, int64_t depth, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const Place& place = at.places[i];
    for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
      const int64_t iy = ky * g.y.length + place.y;
      const int32_t gy = g.y.grid[iy];
      const int32_t* patches = place.grid + gy * g.gw;
      for (int64_t kx = 0; kx < g.kw; ++kx, out += depth) {
        const int64_t ix = kx * g.x.length + place.x;
        const int32_t gx = g.x.grid[ix];
        const int64_t patch = gy < 0 || gx < 0 ? kOutside : patches[gx];
        const T* from = source + ((patch * g.side_source + g.y.in[iy]) * g.side_source + g.x.in[ix]) * stride;
        for (int64_t k = 0; k < depth; ++k) out[k] = patch < 0 ? T(0) : from[k];
      }
    }
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
                      [[maybe_unused]] int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
  const bool few = panels.depth <= kFewChannels;
  // An item is a block of rows and one panel or, with few channels, all panels of a group, which share the unfolding.
  const int64_t rows = g.rows(), blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t together = few ? panels.per_group : 1, depth = (few ? g.taps() : 1) * panels.depth;
#pragma omp parallel num_threads(threads)
  {
    Pairs pairs(kBlockRows);
    std::vector<T> acc(kBlockRows * C), unfolded(few ? kBlockRows * depth : 0);
    // acc[query] += a[pair] times b, for all pairs.
    const auto multiply = [&](auto row_of, const T* b) {
      const T* a[kTileRows];
      T* out[kTileRows];
      for (int64_t p = 0; p < pairs.count; p += kTileRows) {
        const int64_t m = std::min<int64_t>(kTileRows, pairs.count - p);
        for (int64_t i = 0; i < m; ++i) {
          a[i] = row_of(p + i);
          out[i] = acc.data() + pairs.query[p + i] * C;
        }
        tile_of<T>(m, a, depth, b, out);
      }
    };
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < panels.total / together * blocks; ++item) {
      const int64_t first = item / blocks * together;
      const int64_t begin = item % blocks * kBlockRows, count = std::min(rows - begin, kBlockRows);
      const T* from = source + panels.group(first) * panels.depth;
      pairs.enter(g, begin, begin + count);
      if (few) {
        unfold(g, pairs, count, 0, g.kh, from, s.source_channels, panels.depth, unfolded.data());
        pairs.all(count);
      }
      for (int64_t panel = first; panel < first + together; ++panel) {
        const int64_t used = panels.used(panel), column = panels.group(panel) * panels.width + panels.first(panel);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < C; ++c) acc[i * C + c] = bias && c < used ? bias[column + c] : T(0);
        const T* b = packed + panel * g.taps() * panels.depth * C;
        if (few) {
          multiply([&](int64_t p) { return unfolded.data() + p * depth; }, b);
        } else {
          for (int64_t tap = 0; tap < g.taps(); ++tap, b += depth * C) {
            pairs.find(g, count, tap / g.kw, tap % g.kw);
            multiply([&](int64_t p) { return from + pairs.source[p] * s.source_channels; }, b);
          }
        }
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(acc.data() + i * C, used, query + (begin + i) * s.query_channels + column);
      }
    }
  }
}

template <typename T>
void conv_grad_weight(const Geometry& g, const ConvShape& s, const T* source, const T* query, T* packed,
                      [[maybe_unused]] int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
  const bool few = panels.depth <= kFewChannels;
  // An item is one panel and one tap or, with few channels, one row of the kernel.
  const int64_t rows = g.rows(), taps = few ? g.kw : 1, items = g.taps() / taps, depth = taps * panels.depth;
#pragma omp parallel num_threads(threads)
  {
    Pairs pairs(kPairChunk);
    std::vector<T> right(kPairChunk * C, T(0));  // the query's columns of this panel, padded
    std::vector<T> unfolded(few ? kPairChunk * depth : 0);
    const T* row[kPairChunk];
    const T* a[kPairChunk];
    const T* b[kPairChunk];
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < panels.total * items; ++item) {
      const int64_t panel = item / items, tap = item % items * taps;
      const int64_t group = panels.group(panel), used = panels.used(panel);
      const T* from = source + group * panels.depth;
      const T* with = query + group * panels.width + panels.first(panel);
      T* out = packed + item * depth * C;
      std::fill_n(out, depth * C, T(0));
      for (int64_t begin = 0; begin < rows; begin += kPairChunk) {
        const int64_t end = std::min(rows, begin + kPairChunk);
        pairs.enter(g, begin, end);
        if (few) {
          unfold(g, pairs, end - begin, tap / g.kw, tap / g.kw + 1, from, s.source_channels, panels.depth,
                 unfolded.data());
          pairs.all(end - begin);
        } else {
          pairs.find(g, end - begin, tap / g.kw, tap % g.kw);
        }
        for (int64_t p = 0; p < pairs.count; ++p) {
          row[p] = few ? unfolded.data() + p * depth : from + pairs.source[p] * s.source_channels;
          b[p] = with + (begin + pairs.query[p]) * s.query_channels;
          if (used < C) b[p] = std::copy_n(b[p], used, right.data() + p * C) - used;
        }
        for (int64_t k = 0; k < depth; k += kTileRows) {
          for (int64_t p = 0; p < pairs.count; ++p) a[p] = row[p] + k;
          outer_tile_of<T>(std::min<int64_t>(kTileRows, depth - k), a, b, pairs.count, out + k * C);
        }
      }
    }
  }
}

namespace {

constexpr int64_t kDepthBlock = 8;  // channels of a panel that are reordered together, in the cache

// Where a block of a panel lies in the weight (out channels, in channels / groups, taps): `runs` contiguous pieces of
// `length`. Element (k, c, t) of the block is at c * column_step + k * depth_step + t of the pieces put end to end.
struct Block {
  int64_t begin, end, used;  // depth, and columns that exist
  int64_t from, run_step, runs, length, column_step, depth_step;

  Block(const Panels& p, int64_t taps, bool transposed, int64_t panel, int64_t block)
      : begin(block * kDepthBlock), end(std::min(p.depth, begin + kDepthBlock)), used(p.used(panel)) {
    const int64_t inner = transposed ? p.width : p.depth, first = p.first(panel);  // inner: the weight's dimension 1
    const int64_t group = p.group(panel) * p.depth * p.width;
    from = (group + (transposed ? begin * inner + first : first * inner + begin)) * taps;
    run_step = inner * taps;
    runs = transposed ? end - begin : used;
    length = (transposed ? used : end - begin) * taps;
    column_step = transposed ? taps : length;
    depth_step = transposed ? length : taps;
  }
};

int64_t depth_blocks(const Panels& panels) { return (panels.depth + kDepthBlock - 1) / kDepthBlock; }

}  // namespace

template <typename T>
void pack_weight(const ConvShape& s, int64_t taps, bool transposed, const T* weight, T* packed,
                 [[maybe_unused]] int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> stage(C * kDepthBlock * taps);  // strides of a power of two would thrash the cache
#pragma omp for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels.total; ++panel) {
      for (int64_t index = 0; index < depth_blocks(panels); ++index) {
        const Block block(panels, taps, transposed, panel, index);
        for (int64_t r = 0; r < block.runs; ++r)
          std::copy_n(weight + block.from + r * block.run_step, block.length, stage.data() + r * block.length);
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t k = block.begin; k < block.end; ++k) {
            const T* from = stage.data() + (k - block.begin) * block.depth_step + t;
            T* to = packed + ((panel * taps + t) * panels.depth + k) * C;
            for (int64_t c = 0; c < block.used; ++c) to[c] = from[c * block.column_step];
            for (int64_t c = block.used; c < C; ++c) to[c] = T(0);
          }
        }
      }
    }
  }
}

template <typename T>
void unpack_weight(const ConvShape& s, int64_t taps, const T* packed, T* weight, [[maybe_unused]] int threads) {
  constexpr int64_t C = columns<T>();
  const Panels panels(s, C);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> stage(C * kDepthBlock * taps);
#pragma omp for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels.total; ++panel) {
      for (int64_t index = 0; index < depth_blocks(panels); ++index) {
        const Block block(panels, taps, false, panel, index);
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t k = block.begin; k < block.end; ++k) {
            const T* from = packed + ((panel * taps + t) * panels.depth + k) * C;
            T* to = stage.data() + (k - block.begin) * block.depth_step + t;
            for (int64_t c = 0; c < block.used; ++c) to[c * block.column_step] = from[c];
          }
        }
        for (int64_t r = 0; r < block.runs; ++r)
          std::copy_n(stage.data() + r * block.length, block.length, weight + block.from + r * block.run_step);
      }
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                                   \
  template void conv_gather_gemm<T>(const Geometry&, const ConvShape&, const T*, const T*, const T*, T*, int); \
  template void conv_grad_weight<T>(const Geometry&, const ConvShape&, const T*, const T*, T*, int);           \
  template void pack_weight<T>(const ConvShape&, int64_t, bool, const T*, T*, int);                            \
  template void unpack_weight<T>(const ConvShape&, int64_t, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
