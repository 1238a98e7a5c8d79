// Convolution on packed rows: for each tap the pairs of rows that exist are listed, gathered, multiplied and added in
// one pass. Nothing is computed for masked pixels, and no unfolded copy of the input is made.
#include <algorithm>
#include <vector>

#include "outer.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kItemChunks = 8;  // chunks that share a packed weight, where there are enough items all the same
constexpr int64_t kSegmentBytes = 1 << 24;  // of lists that exist at a time

// The pairs (source row, query row) of every chunk and tap of a segment of query rows.
struct Pairs {
  int64_t taps, capacity;  // chunks
  std::vector<int64_t> source, count;
  std::vector<uint16_t> query;  // relative to the chunk's first row

  Pairs(int64_t taps, int64_t rows)
      : taps(taps),
        capacity(std::min((rows + kChunk - 1) / kChunk, std::max<int64_t>(1, kSegmentBytes / (kChunk * taps * 10)))),
        source(capacity * taps * kChunk), count(capacity * taps), query(capacity * taps * kChunk) {}

  int64_t at(int64_t chunk, int64_t tap) const { return (chunk * taps + tap) * kChunk; }

  // As WeightGradient asks for them.
  struct OfTap {
    int64_t count;
    const uint16_t* index;
    struct {
      const int64_t* rows;
      int64_t operator()(int64_t p) const { return rows[p]; }
    } source_of;
  };
  OfTap operator()(int64_t chunk, int64_t tap) const {
    return {count[chunk * taps + tap], query.data() + at(chunk, tap), {source.data() + at(chunk, tap)}};
  }

  void find(const Geometry& g, int64_t chunk, int64_t begin, int64_t end) {
    int64_t* const counts = count.data() + chunk * taps;
    std::fill_n(counts, taps, 0);
    for (int64_t row = begin; row < end; ++row) {
      const Place p = place_of(g, row);
      for (int64_t ky = 0, tap = 0; ky < g.kh; ++ky) {
        const int32_t gy = g.y.grid[ky * g.y.length + p.y];
        if (gy < 0) {
          tap += g.kw;
          continue;
        }
        const int64_t in_y = g.y.in[ky * g.y.length + p.y];
        const int32_t* const patches = p.grid + gy * g.gw;
        for (int64_t kx = 0; kx < g.kw; ++kx, ++tap) {
          const int64_t ix = kx * g.x.length + p.x;
          const int32_t gx = g.x.grid[ix];
          const int64_t patch = gx < 0 ? -1 : patches[gx];
          if (patch < 0) continue;
          const int64_t to = at(chunk, tap) + counts[tap]++;
          source[to] = (patch * g.source.height + in_y) * g.source.width + g.x.in[ix];
          query[to] = static_cast<uint16_t>(row - begin);
        }
      }
    }
  }
};

// One panel of the weight, [taps, depth, panel], for source channels [k, k + depth) of a group.
template <typename T>
void pack(const Panels& panels, int64_t taps, bool transposed, const T* weight, int64_t panel, int64_t k, int64_t depth,
          T* packed) {
  constexpr int64_t C = panel_width<T>(), L = Vector<T>::lanes;
  const int64_t used = panels.used(panel), first = panels.first(panel), size = panels.depth * panels.width * taps;
  const int64_t inner = transposed ? panels.width : panels.depth;  // the weight's dimension 1
  weight += panels.group(panel) * size;
  Vec<T> m[L];
  for (int64_t c = 0; c < C; c += L) {
    if (transposed) {  // weight [depth, width, taps]
      for (int64_t j = 0; j < depth; ++j) {
        const T* const from = weight + ((k + j) * inner + first + c) * taps;
        for (int64_t t = 0; t < taps; t += L) {
          const int64_t count = std::min(L, taps - t);
          load_columns(from + t, taps, used - c, count, weight + size, m);
          for (int64_t i = 0; i < count; ++i) store(packed + ((t + i) * depth + j) * C + c, m[i]);
        }
      }
    } else {  // weight [width, depth, taps]: a column of the panel is one run of depth * taps
      const T* const from = weight + ((first + c) * inner + k) * taps;
      for (int64_t r = 0; r < depth * taps; r += L) {
        const int64_t count = std::min(L, depth * taps - r);
        load_columns(from + r, inner * taps, used - c, count, weight + size, m);
        for (int64_t i = 0; i < count; ++i) store(packed + ((r + i) % taps * depth + (r + i) / taps) * C + c, m[i]);
      }
    }
  }
}

// One item of conv_gather: a panel for `chunks` chunks of a segment that starts at query row `segment`.
template <typename T>
struct GatherItem {
  const Geometry& g;
  const ConvShape& s;
  const Panels& panels;
  const Pairs& pairs;
  std::vector<T> packed, acc;

  GatherItem(const Geometry& g, const ConvShape& s, const Panels& panels, const Pairs& pairs)
      : g(g), s(s), panels(panels), pairs(pairs), packed(g.taps() * std::min(panels.depth, kDepth) * panel_width<T>()) {
  }

  void run(const T* source, const T* weight, bool transposed, const T* bias, T* query, int64_t segment, int64_t panel,
           int64_t first_chunk, int64_t chunks) {
    constexpr int64_t C = panel_width<T>();
    const int64_t begin = segment + first_chunk * kChunk, count = std::min(g.rows() - begin, chunks * kChunk);
    const int64_t used = panels.used(panel), column = panels.group(panel) * panels.width + panels.first(panel);
    // A whole panel accumulates where its result belongs; a narrower one in a buffer of its own.
    const bool direct = used == C;
    if (!direct) acc.resize(chunks * kChunk * C);
    T* const out = direct ? query + begin * s.query_channels + column : acc.data();
    const int64_t ldo = direct ? s.query_channels : C;
    const BiasRow<T> start(bias, column, used);
    for (int64_t i = 0; i < count; ++i) std::copy_n(start.values, C, out + i * ldo);
    for (int64_t k = 0; k < panels.depth; k += kDepth) {
      const int64_t depth = std::min(kDepth, panels.depth - k);
      pack(panels, g.taps(), transposed, weight, panel, k, depth, packed.data());
      const T* const from = source + panels.group(panel) * panels.depth + k;
      for (int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
          const int64_t at = pairs.at(first_chunk + chunk, tap);
          const int64_t* const rows = pairs.source.data() + at;
          const uint16_t* const to = pairs.query.data() + at;
          T* const sums = out + chunk * kChunk * ldo;
          multiply<T>(
              pairs.count[(first_chunk + chunk) * g.taps() + tap], depth, packed.data() + tap * depth * C, used,
              nullptr, [&](int64_t i) { return from + rows[i] * s.source_channels; },
              [&](int64_t i) { return sums + to[i] * ldo; });
        }
      }
    }
    if (!direct)
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(out + i * C, used, query + (begin + i) * s.query_channels + column);
  }
};

// Runs `items(segment, chunks)` inside a parallel region, for segments of query rows whose pairs have been listed.
template <typename Items>
void for_segments(const Geometry& g, Pairs& pairs, Items items) {
  for (int64_t segment = 0; segment < g.rows(); segment += pairs.capacity * kChunk) {
    const int64_t chunks = std::min(pairs.capacity, (g.rows() - segment + kChunk - 1) / kChunk);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = segment + chunk * kChunk;
      pairs.find(g, chunk, begin, std::min(g.rows(), begin + kChunk));
    }
    items(segment, chunks);
  }
}

}  // namespace

template <typename T>
void conv_gather(const Geometry& g, const ConvShape& s, const T* source, const T* weight, bool transposed,
                 const T* bias, T* query, int threads) {
  if (!g.rows() || !s.query_channels) return;
  const Panels panels(s.source_channels / s.groups, s.query_channels / s.groups, s.groups, panel_width<T>());
  if (panels.depth <= kFewChannels && g.taps() > 1 && !transposed)
    return conv_unfolded(g, s, source, weight, bias, query, threads);
  Pairs pairs(g.taps(), g.rows());
#pragma omp parallel num_threads(threads)
  {
    GatherItem<T> item(g, s, panels, pairs);
    for_segments(g, pairs, [&](int64_t segment, int64_t chunks) {
      const int64_t wanted = std::max<int64_t>(1, 4 * threads / panels.total);
      const int64_t step = std::max<int64_t>(1, std::min(kItemChunks, chunks / wanted));
      const int64_t groups = (chunks + step - 1) / step;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < groups * panels.total; ++i) {
        const int64_t first = i / panels.total * step;
        item.run(source, weight, transposed, bias, query, segment, i % panels.total, first,
                 std::min(step, chunks - first));
      }
    });
  }
}

template <typename T>
void conv_grad_weight(const Geometry& g, const ConvShape& s, const T* source, const T* grad, T* weight, int threads) {
  if (!g.rows() || !s.query_channels || !s.source_channels) {  // no pair, no gradient
    std::fill_n(weight, s.query_channels * (s.source_channels / s.groups) * g.taps(), T(0));
    return;
  }
  if (s.source_channels / s.groups <= kFewChannels && g.taps() > 1)
    return conv_unfolded_grad_weight(g, s, source, grad, weight, threads);
  Pairs pairs(g.taps(), g.rows());
  WeightGradient<T> gradient(s, g.taps(), pairs.capacity, pairs.capacity * kChunk >= g.rows(), weight);
#pragma omp parallel num_threads(threads)
  {
    typename WeightGradient<T>::Scratch scratch(gradient);
    for_segments(g, pairs, [&](int64_t segment, int64_t chunks) {
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < gradient.items(); ++item)
        gradient.run(item, segment == 0, g.rows() - segment, chunks, grad + segment * s.query_channels, source, pairs,
                     scratch);
    });
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < gradient.units(); ++unit) gradient.finish(unit);
  }
}

#define SPARK_INSTANTIATE(T)                                                                                    \
  template void conv_gather<T>(const Geometry&, const ConvShape&, const T*, const T*, bool, const T*, T*, int); \
  template void conv_grad_weight<T>(const Geometry&, const ConvShape&, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
