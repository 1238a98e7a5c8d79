// 3x3 convolution of stride 1 and padding 1 by Winograd's minimal filtering F(2x2, 3x3): each tile of 2x2 query pixels
// reads 4x4 source pixels and needs 16 products per pair of channels instead of 36. Masked source pixels are 0.
//   forward   y = A' [(G g G') . (B' d B)] A
//   gradient  g = G' [(A y A') . (B' d B)] G     of the weight, summed over tiles; that of the input is a forward pass
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). The transforms only add and halve.
#include <algorithm>
#include <memory>
#include <vector>

#include "outer.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kTileBlock = 48;         // tiles that go through forward together
constexpr int64_t kAhead = 4;              // tiles whose source is asked for before it is needed
constexpr int64_t kManyWeights = 1 << 22;  // transformed weights beyond which larger blocks save reading them

// B' d B
template <typename V>
inline void transform_source(V (&d)[16]) {
  for (int i = 0; i < 4; ++i) {  // rows
    const V a = d[i], b = d[4 + i], c = d[8 + i], e = d[12 + i];
    d[i] = a - c, d[4 + i] = b + c, d[8 + i] = c - b, d[12 + i] = b - e;
  }
  for (int i = 0; i < 16; i += 4) {
    const V a = d[i], b = d[i + 1], c = d[i + 2], e = d[i + 3];
    d[i] = a - c, d[i + 1] = b + c, d[i + 2] = c - b, d[i + 3] = b - e;
  }
}

// A' m A
template <typename V>
inline void transform_product(const V (&m)[16], V (&y)[4]) {
  V top[4], bottom[4];
  for (int i = 0; i < 4; ++i) {
    top[i] = m[i] + m[4 + i] + m[8 + i];
    bottom[i] = m[4 + i] - m[8 + i] - m[12 + i];
  }
  y[0] = top[0] + top[1] + top[2], y[1] = top[1] - top[2] - top[3];
  y[2] = bottom[0] + bottom[1] + bottom[2], y[3] = bottom[1] - bottom[2] - bottom[3];
}

// A y A'
template <typename V>
inline void transform_grad(const V (&y)[4], V (&z)[16]) {
  const V rows[4][2] = {{y[0], y[1]}, {y[0] + y[2], y[1] + y[3]}, {y[0] - y[2], y[1] - y[3]}, {-y[2], -y[3]}};
  for (int i = 0; i < 4; ++i) {
    z[4 * i] = rows[i][0], z[4 * i + 1] = rows[i][0] + rows[i][1];
    z[4 * i + 2] = rows[i][0] - rows[i][1], z[4 * i + 3] = -rows[i][1];
  }
}

// G g G'
template <typename V>
inline void transform_weight(const V (&g)[9], V (&u)[16]) {
  V rows[4][3];
  for (int i = 0; i < 3; ++i) {
    const V sum = (g[i] + g[6 + i]) * 0.5f, half = g[3 + i] * 0.5f;
    rows[0][i] = g[i], rows[1][i] = sum + half, rows[2][i] = sum - half, rows[3][i] = g[6 + i];
  }
  for (int i = 0; i < 4; ++i) {
    const V sum = (rows[i][0] + rows[i][2]) * 0.5f, half = rows[i][1] * 0.5f;
    u[4 * i] = rows[i][0], u[4 * i + 1] = sum + half, u[4 * i + 2] = sum - half, u[4 * i + 3] = rows[i][2];
  }
}

// G' s G
template <typename V>
inline void transform_sum(const V (&s)[16], V (&g)[9]) {
  V rows[3][4];
  for (int i = 0; i < 4; ++i) {
    const V sum = (s[4 + i] + s[8 + i]) * 0.5f, difference = (s[4 + i] - s[8 + i]) * 0.5f;
    rows[0][i] = s[i] + sum, rows[1][i] = difference, rows[2][i] = sum + s[12 + i];
  }
  for (int i = 0; i < 3; ++i) {
    const V sum = (rows[i][1] + rows[i][2]) * 0.5f, difference = (rows[i][1] - rows[i][2]) * 0.5f;
    g[3 * i] = rows[i][0] + sum, g[3 * i + 1] = difference, g[3 * i + 2] = sum + rows[i][3];
  }
}

// Row of the first pixel of the cell at (y, x) of a patch, and how far from it the cell's pixel `i` is.
inline int64_t cell_row(const PatchSize& size, int64_t cell, int64_t patch, int64_t y, int64_t x) {
  return (patch * size.height + y) * size.width * cell * cell + x * cell;
}

inline int64_t cell_pixel(const PatchSize& size, int64_t cell, int64_t i) {
  return i / cell * size.width * cell + i % cell;
}

// Where the 4x4 source pixels (or cells) and the 2x2 query pixels of a tile lie.
struct Tile {
  int64_t source[16];  // rows, negative where there is none
  int64_t query;       // row of the top left pixel
  bool empty;          // no source pixel exists
};

inline int64_t tile_count(const Geometry& g) { return g.patches * (g.query.area() / 4); }

inline Tile tile_at(const Geometry& g, const ConvShape& s, int64_t index) {
  const int32_t across = static_cast<int32_t>(g.query.width / 2), area = static_cast<int32_t>(g.query.area() / 4);
  const int64_t patch = index / area;
  const int32_t pixel = static_cast<int32_t>(index % area), ty = pixel / across, tx = pixel % across;
  const int32_t* const c = g.coords + 3 * patch;
  const int32_t* const grid = g.grid_to_patch + c[0] * g.gh * g.gw;
  const int64_t y = c[1] * g.query.height + 2 * ty, x = c[2] * g.query.width + 2 * tx;
  Tile tile;
  tile.query = cell_row(g.query, s.query_cell, patch, 2 * ty, 2 * tx);
  int32_t gy[4], gx[4], in_y[4], in_x[4];
  for (int64_t i = 0; i < 4; ++i) {
    // pixels y - 1, y, y + 1 are taps 0 to 2 of query pixel y; y + 2 is tap 2 of the next one
    const int64_t iy = std::min<int64_t>(i, 2) * g.y.length + y + i / 3;
    const int64_t ix = std::min<int64_t>(i, 2) * g.x.length + x + i / 3;
    gy[i] = g.y.grid[iy], in_y[i] = g.y.in[iy], gx[i] = g.x.grid[ix], in_x[i] = g.x.in[ix];
  }
  if (gy[0] >= 0 && gy[0] == gy[3] && gx[0] >= 0 && gx[0] == gx[3]) {  // inside one source patch
    const int64_t from = grid[gy[0] * g.gw + gx[0]];
    tile.empty = from < 0;
    const int64_t first = cell_row(g.source, s.source_cell, from, in_y[0], in_x[0]);
    const int64_t down = g.source.width * s.source_cell * s.source_cell;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) tile.source[4 * i + j] = from < 0 ? -1 : first + i * down + j * s.source_cell;
    return tile;
  }
  tile.empty = true;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t from = gy[i] < 0 || gx[j] < 0 ? -1 : grid[gy[i] * g.gw + gx[j]];
      tile.source[4 * i + j] = from < 0 ? -1 : cell_row(g.source, s.source_cell, from, in_y[i], in_x[j]);
      tile.empty &= from < 0;
    }
  }
  return tile;
}

// Calls store_at(k, d) with the 16 values d of the transformed tile for each vector of channels, which starts at `k`.
template <typename T, typename Store>
inline void transform_tile(const Geometry& g, const ConvShape& s, const Tile& tile, const T* source, const T* zeros,
                           Store store_at) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t channels = s.source_channels;
  for (int64_t pixel = 0; pixel < s.source_cell * s.source_cell; ++pixel) {
    const int64_t inside = cell_pixel(g.source, s.source_cell, pixel);
    const T* from[16];
    for (int i = 0; i < 16; ++i) from[i] = tile.source[i] < 0 ? zeros : source + (tile.source[i] + inside) * channels;
    int64_t c = 0;
    Vec<T> d[16];
    for (; c + L <= channels; c += L) {
      for (int i = 0; i < 16; ++i) d[i] = load(from[i] + c);
      transform_source(d);
      store_at(pixel * channels + c, d);
    }
    if (c < channels) {
      for (int i = 0; i < 16; ++i) d[i] = load_part(from[i] + c, channels - c);
      transform_source(d);
      store_at(pixel * channels + c, d);
    }
  }
}

// Arrays of 16 matrices lie apart by their size and one more vector: a power of two would thrash the cache.
template <typename T>
constexpr int64_t apart(int64_t size) {
  return size + Vector<T>::lanes;
}

// g[t][c] = from[c * stride + t] for the 9 taps of `used` channels.
template <typename T>
inline void load_taps(const T* from, int64_t stride, int64_t used, const T* end, Vec<T> (&g)[9]) {
  constexpr int64_t L = Vector<T>::lanes;
  for (int64_t t = 0; t < 9; t += L) {
    Vec<T> m[L];
    load_columns(from + t, stride, used, std::min(L, 9 - t), end, m);
    std::copy_n(m, std::min(L, 9 - t), g + t);
  }
}

// The transformed weight as [panels, 16, source channels, panel]. See conv_gather for `transposed`, which also turns
// the kernel by 180 degrees.
template <typename T>
void pack_weight(const ConvShape& s, const Panels& panels, bool transposed, const T* weight, T* packed) {
  constexpr int64_t C = panel_width<T>();
  constexpr int L = Vector<T>::lanes;
  const T* const end = weight + s.width() * panels.depth * 9;
#pragma omp for collapse(2) schedule(static)
  for (int64_t panel = 0; panel < panels.total; ++panel) {
    for (int64_t k = 0; k < panels.depth; ++k) {
      const int64_t first = panels.group(panel) * panels.width + panels.first(panel), used = panels.used(panel);
      for (int64_t c = 0; c < C; c += L) {
        const T* const from =
            transposed ? weight + (k * s.width() + first + c) * 9 : weight + ((first + c) * panels.depth + k) * 9;
        Vec<T> g[9], u[16];
        load_taps(from, transposed ? 9 : panels.depth * 9, used - c, end, g);
        if (transposed) std::reverse(g, g + 9);
        transform_weight(g, u);
        for (int i = 0; i < 16; ++i) store(packed + ((panel * 16 + i) * panels.depth + k) * C + c, u[i]);
      }
    }
  }
}

// The working memory of one thread of winograd_forward.
template <typename T>
struct ForwardBlock {
  const Geometry& g;
  const ConvShape& s;
  int64_t size, stride, source_step, product_step;  // tiles; channels of a row in whole vectors; between matrices
  std::vector<Tile> tiles;
  std::vector<T> sources, products, zeros;  // [16, tiles, stride], [16, tiles, panel]

  ForwardBlock(const Geometry& g, const ConvShape& s, int64_t size)
      : g(g), s(s), size(size), stride(s.depth() + Vector<T>::lanes - s.depth() % Vector<T>::lanes),
        source_step(apart<T>(size * stride)), product_step(apart<T>(size * panel_width<T>())),
        sources(16 * source_step), products(16 * product_step), zeros(s.source_channels) {
    tiles.reserve(size);
  }

  void run(int64_t begin, int64_t end, const T* source, const Panels& panels, const T* packed, const T* bias,
           T* query) {
    tiles.clear();
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at(g, s, index);
      if (tile.empty)
        fill(tile, bias, query);
      else
        tiles.push_back(tile);
    }
    const int64_t count = tiles.size();
    for (int64_t t = 0; t < count; ++t) {
      if (t + kAhead < count) prefetch(tiles[t + kAhead], source);
      T* const to = sources.data() + t * stride;
      transform_tile(g, s, tiles[t], source, zeros.data(), [&](int64_t c, const Vec<T>(&d)[16]) {
        for (int i = 0; i < 16; ++i) store(to + i * source_step + c, d[i]);
      });
    }
    for (int64_t panel = 0; panel < panels.total; ++panel) {
      multiply_panel(count, packed + panel * 16 * panels.depth * panel_width<T>(), panels.used(panel));
      finish_panel(panels, panel, bias, query);
    }
  }

  // The middle pixels of a tile; its neighbours ask for the others.
  void prefetch(const Tile& tile, const T* source) {
    for (const int i : {5, 6, 9, 10}) {
      if (tile.source[i] < 0) continue;
      const char* const from = reinterpret_cast<const char*>(source + tile.source[i] * s.source_channels);
      for (size_t byte = 0; byte < s.source_channels * sizeof(T); byte += 64) __builtin_prefetch(from + byte);
    }
  }

  // The 2x2 pixels of a tile that sees no source pixel.
  void fill(const Tile& tile, const T* bias, T* query) {
    for (int64_t pixel = 0; pixel < 4; ++pixel) {
      for (int64_t i = 0; i < s.query_cell * s.query_cell; ++i) {
        const int64_t row = tile.query + cell_row(g.query, s.query_cell, 0, pixel / 2, pixel % 2) +
                            cell_pixel(g.query, s.query_cell, i);
        T* const to = query + row * s.query_channels;
        for (int64_t c = 0; c < s.query_channels; ++c) to[c] = bias ? bias[i * s.query_channels + c] : T(0);
      }
    }
  }

  void multiply_panel(int64_t count, const T* packed, int64_t used) {
    constexpr int64_t C = panel_width<T>();
    const BiasRow<T> zero(nullptr, 0, 0);
    for (int64_t i = 0; i < 16; ++i) {
      const T* const from = sources.data() + i * source_step;
      T* const to = products.data() + i * product_step;
      multiply<T>(
          count, s.depth(), packed + i * s.depth() * C, used, zero.values, [&](int64_t t) { return from + t * stride; },
          [&](int64_t t) { return to + t * C; });
    }
  }

  void finish_panel(const Panels& panels, int64_t panel, const T* bias, T* query) {
    constexpr int64_t C = panel_width<T>();
    constexpr int L = Vector<T>::lanes;
    const int64_t used = panels.used(panel), pixel = panels.group(panel);
    const BiasRow<T> start(bias, pixel * panels.width + panels.first(panel), used);
    query += cell_pixel(g.query, s.query_cell, pixel) * s.query_channels + panels.first(panel);
    const int64_t right = s.query_cell * s.query_channels, down = s.query_cell * g.query.width * right;
    for (int64_t t = 0; t < static_cast<int64_t>(tiles.size()); ++t) {
      T* const to = query + tiles[t].query * s.query_channels;
      for (int64_t c = 0; c < used; c += L) {
        Vec<T> m[16], y[4];
        for (int i = 0; i < 16; ++i) m[i] = load(products.data() + i * product_step + t * C + c);
        transform_product(m, y);
        const Vec<T> offset = load(start.values + c);
        store_part(to + c, y[0] + offset, used - c);
        store_part(to + c + right, y[1] + offset, used - c);
        store_part(to + c + down, y[2] + offset, used - c);
        store_part(to + c + down + right, y[3] + offset, used - c);
      }
    }
  }
};

// Transformed tiles of the source and of the output's gradient, in the order in which the outer product reads them:
// sources [16, panels, tiles, panel], grads [16, blocks of kLeft channels, tiles, channels].
template <typename T>
struct GradientBlock {
  static constexpr int64_t kLeft = Tiles<T>::kLeft;

  const Geometry& g;
  const ConvShape& s;
  const Panels& panels;
  int64_t size, height;
  int64_t panel_step, left_step, source_step, grad_step;  // between panels, blocks of channels, matrices
  std::vector<T> sources, grads, zeros;
  std::vector<Tile> tiles;

  GradientBlock(const Geometry& g, const ConvShape& s, const Panels& panels, int64_t size)
      : g(g), s(s), panels(panels), size(size), height((s.width() + kLeft - 1) / kLeft * kLeft),
        panel_step(apart<T>(size * panel_width<T>())), left_step(apart<T>(size * kLeft)),
        source_step(apart<T>(panels.total * panel_step)), grad_step(apart<T>(height / kLeft * left_step)),
        sources(16 * source_step), grads(16 * grad_step), zeros(s.source_channels), tiles(size) {}

  void transform(int64_t t, const T* source, const T* grad) {
    constexpr int64_t C = panel_width<T>();
    constexpr int64_t L = Vector<T>::lanes;
    transform_tile(g, s, tiles[t], source, zeros.data(), [&](int64_t c, const Vec<T>(&d)[16]) {
      T* const to = sources.data() + c / C * panel_step + t * C + c % C;
      for (int64_t i = 0; i < 16; ++i) store(to + i * source_step, d[i]);
    });
    const int64_t right = s.query_cell * s.query_channels, down = s.query_cell * g.query.width * right;
    for (int64_t pixel = 0; pixel < s.query_cell * s.query_cell; ++pixel) {
      const T* const from = grad + (tiles[t].query + cell_pixel(g.query, s.query_cell, pixel)) * s.query_channels;
      for (int64_t c = 0; c < s.query_channels; c += L) {
        Vec<T> y[4], z[16];
        const int64_t rest = s.query_channels - c, o = pixel * s.query_channels + c;
        y[0] = load_part(from + c, rest), y[1] = load_part(from + c + right, rest);
        y[2] = load_part(from + c + down, rest), y[3] = load_part(from + c + down + right, rest);
        transform_grad(y, z);
        T* const to = grads.data() + o / kLeft * left_step + t * kLeft + o % kLeft;
        for (int64_t i = 0; i < 16; ++i) store(to + i * grad_step, z[i]);
      }
    }
  }
};

}  // namespace

template <typename T>
void winograd_forward(const Geometry& g, const ConvShape& s, const T* source, const T* weight, bool transposed,
                      const T* bias, T* query, int threads) {
  constexpr int64_t C = panel_width<T>();
  const Panels panels(s.depth(), s.query_channels, s.query_cell * s.query_cell, C);
  const int64_t weights = panels.total * 16 * panels.depth * C, tiles = tile_count(g);
  const std::unique_ptr<T[]> packed(new T[weights]);
  // As many blocks for each thread, of whole register tiles.
  const int64_t most = weights > kManyWeights ? 2 * kTileBlock : kTileBlock;
  const int64_t rounds = std::max<int64_t>(1, (tiles + most * threads - 1) / (most * threads));
  const int64_t share = std::max<int64_t>(1, (tiles + rounds * threads - 1) / (rounds * threads));
  const int64_t size = (share + kTileRows - 1) / kTileRows * kTileRows, blocks = (tiles + size - 1) / size;
#pragma omp parallel num_threads(threads)
  {
    pack_weight(s, panels, transposed, weight, packed.get());
    ForwardBlock<T> block(g, s, size);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks; ++i)
      block.run(i * size, std::min(tiles, (i + 1) * size), source, panels, packed.get(), bias, query);
  }
}

template <typename T>
void winograd_grad_weight(const Geometry& g, const ConvShape& s, const T* source, const T* grad, T* weight,
                          [[maybe_unused]] int threads) {
  constexpr int64_t C = panel_width<T>();
  constexpr int64_t L = Vector<T>::lanes;
  constexpr int64_t kLeft = GradientBlock<T>::kLeft;
  const Panels panels(s.width(), s.source_channels, 1, C);
  const int64_t size = kChunk, tiles = tile_count(g);
  if (!tiles) {  // no pair, no gradient
    std::fill_n(weight, s.width() * s.source_channels * 9, T(0));
    return;
  }
  GradientBlock<T> block(g, s, panels, size);
  const std::unique_ptr<T[]> sums(new T[16 * panels.total * block.height * C]);  // [16, panels, query channels, panel]
  std::vector<Tile> listed(size);
  int64_t count = 0, next = 0;  // tiles in the block; first tile not looked at
#pragma omp parallel num_threads(threads)
  {
    while (next < tiles) {
#pragma omp barrier
      const int64_t begin = next, looked = std::min(size, tiles - begin);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < looked; ++i) listed[i] = tile_at(g, s, begin + i);
#pragma omp single
      {
        count = 0;
        for (int64_t i = 0; i < looked; ++i)
          if (!listed[i].empty) block.tiles[count++] = listed[i];
        next = begin + looked;
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) block.transform(t, source, grad);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = 0; i < 16; ++i) {
        for (int64_t panel = 0; panel < panels.total; ++panel) {
          const T* const right = block.sources.data() + i * block.source_step + panel * block.panel_step;
          T* const out = sums.get() + (i * panels.total + panel) * block.height * C;
          for (int64_t m = 0; m < block.height; m += kOuterRows) {
            const T* const left = block.grads.data() + i * block.grad_step + m / kLeft * block.left_step + m % kLeft;
            if (panels.used(panel) <= L)
              outer_tile<T, kOuterRows, 1, false>(left, kLeft, nullptr, right, count, out + m * C, C, begin == 0);
            else
              outer_tile<T, kOuterRows, 2, false>(left, kLeft, nullptr, right, count, out + m * C, C, begin == 0);
          }
        }
      }
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t o = 0; o < s.width(); ++o) {
      for (int64_t panel = 0; panel < panels.total; ++panel) {
        T* const to = weight + (o * s.source_channels + panels.first(panel)) * 9;
        for (int64_t c = 0; c < panels.used(panel); c += L) {
          Vec<T> sum[16], taps[9];
          for (int64_t i = 0; i < 16; ++i)
            sum[i] = load(sums.get() + ((i * panels.total + panel) * block.height + o) * C + c);
          transform_sum(sum, taps);
          for (int64_t t = 0; t < 9; t += L) {
            Vec<T> m[L] = {};
            std::copy_n(taps + t, std::min(L, 9 - t), m);
            store_columns(m, 9, panels.used(panel) - c, std::min(L, 9 - t), to + c * 9 + t);
          }
        }
      }
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                                         \
  template void winograd_forward<T>(const Geometry&, const ConvShape&, const T*, const T*, bool, const T*, T*, int); \
  template void winograd_grad_weight<T>(const Geometry&, const ConvShape&, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
