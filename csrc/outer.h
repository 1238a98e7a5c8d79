// The gradient of a weight: for each tap the sum over pairs of rows of the outer product of the output's gradient and
// the source. Work is cut into items of (split of the rows, block of output channels, group of panels of source
// channels); the splits' partial sums are added in order, so that the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace spark {
namespace SPARK_ISA {

constexpr int kOuterRows = kTileRows == 12 ? 8 : 4;
constexpr int64_t kChunk = 256;  // query rows that are handled together

// out[m, :] = (0 if `fresh`, else itself) + sum over p of a[row p][m] * b[p][:], for M channels of a's rows, `lda`
// apart, and rows of out `ldo` apart; row p is index[p], or p. The sum is added as a whole: of N rows a sum has
// kChunk + N / kChunk roundings in a row.
template <typename T, int M, int N, bool Indexed>
SPARK_NOINLINE void outer_tile(const T* a, int64_t lda, const uint16_t* index, const T* b, int64_t pairs, T* out,
                               int64_t ldo, bool fresh) {
  typedef typename Vector<T>::type V;
  constexpr int L = Vector<T>::lanes, C = panel_width<T>();
  V sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = V{};
  for (int64_t p = 0; p < pairs; ++p, b += C) {
    const T* const row = a + (Indexed ? index[p] : p) * lda;
    V right[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) right[n] = load(b + n * L);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T value = row[m];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += value * right[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      T* const to = out + m * ldo + n * L;
      store(to, fresh ? sum[m][n] : load(to) + sum[m][n]);
    }
}

// Channels of kChunk rows in columns of kLeft channels, each (rows, kLeft): rows a power of two apart thrash the cache.
template <typename T>
class Tiles {
 public:
  static constexpr int64_t kLeft = std::max<int64_t>(Vector<T>::lanes, kOuterRows);

  explicit Tiles(int64_t height) : data_((height + kLeft - 1) / kLeft * kStride) {}

  void pack(int64_t height, int64_t rows, const T* from, int64_t stride) {
    const int64_t whole = height / kLeft * kLeft, rest = height - whole;
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      T* to = data_.data() + r * kLeft;
      for (int64_t m = 0; m < whole; m += kLeft, to += kStride) std::copy_n(from + m, kLeft, to);
      if (rest) std::copy_n(from + whole, rest, to);
    }
  }

  const T* tile(int64_t m) const { return data_.data() + m / kLeft * kStride + m % kLeft; }

 private:
  static constexpr int64_t kStride = (kChunk + 1) * kLeft;
  std::vector<T> data_;
};

template <typename T, int N, bool Indexed, int M = kOuterRows>
inline void outer_tile_of(int64_t height, const T* a, const uint16_t* index, const T* b, int64_t pairs, T* out,
                          int64_t ldo, bool fresh) {
  if constexpr (M > 0) {
    if (height == M)
      outer_tile<T, M, N, Indexed>(a, Tiles<T>::kLeft, index, b, pairs, out, ldo, fresh);
    else
      outer_tile_of<T, N, Indexed, M - 1>(height, a, index, b, pairs, out, ldo, fresh);
  }
}

// The same for `height` channels in tiles, and the `used` columns of a panel.
template <typename T>
inline void outer(int64_t height, const Tiles<T>& tiles, const uint16_t* index, const T* b, int64_t pairs, int64_t used,
                  T* out, int64_t ldo, bool fresh) {
  const bool narrow = used <= Vector<T>::lanes;
  for (int64_t m = 0; m < height; m += kOuterRows, out += kOuterRows * ldo) {
    const int64_t tile = std::min<int64_t>(kOuterRows, height - m);
    const T* const a = tiles.tile(m);
    if (narrow && index)
      outer_tile_of<T, 1, true>(tile, a, index, b, pairs, out, ldo, fresh);
    else if (narrow)
      outer_tile_of<T, 1, false>(tile, a, index, b, pairs, out, ldo, fresh);
    else if (index)
      outer_tile_of<T, 2, true>(tile, a, index, b, pairs, out, ldo, fresh);
    else
      outer_tile_of<T, 2, false>(tile, a, index, b, pairs, out, ldo, fresh);
  }
}

// The `used` columns of a row as one of a panel.
template <typename T>
inline void pack_row(const T* from, int64_t used, T* to) {
  constexpr int64_t C = panel_width<T>();
  if (used == C) {
    std::copy_n(from, C, to);
  } else {
    std::copy_n(from, used, to);
    std::fill_n(to + used, C - used, T(0));
  }
}

template <typename T>
class WeightGradient {
 public:
  // What a thread works with.
  struct Scratch {
    Tiles<T> left;
    std::vector<T> right, sums;

    explicit Scratch(const WeightGradient& of)
        : left(of.height_), right(kChunk * panel_width<T>()), sums(of.local_ ? of.size_ : 0) {}
  };

  // `chunks` of kChunk rows at most are given to one run(); `whole`: there is only one.
  WeightGradient(const ConvShape& s, int64_t taps, int64_t chunks, bool whole, T* weight)
      : s_(s), taps_(taps), weight_(weight), width_(s.query_channels / s.groups),
        panels_(width_, s.source_channels / s.groups, s.groups, panel_width<T>()) {
    group_ = std::min(kGroup, panels_.per_group);
    groups_ = (panels_.per_group + group_ - 1) / group_ * s.groups;
    height_ = std::min(width_, kHeight);
    const int64_t blocks = (width_ + height_ - 1) / height_;
    splits_ = std::max<int64_t>(1, std::min(kItems / (blocks * groups_), chunks / 4));
    items_ = splits_ * blocks * groups_;
    size_ = group_ * taps_ * height_ * panel_width<T>();
    direct_ = taps_ == 1 && splits_ == 1 && panels_.width % panel_width<T>() == 0;
    local_ = splits_ == 1 && !direct_ && whole;
    if (!direct_ && !local_) sums_.reset(new T[items_ * size_]);
  }

  int64_t items() const { return items_; }

  // Adds an item's share of `chunks` chunks of `rows` query rows, which are the first ones if `fresh`. For each chunk
  // and tap `pairs(chunk, tap)` gives {count, index of the query rows or null, function from a pair to its source row}.
  template <typename Pairs>
  void run(int64_t item, bool fresh, int64_t rows, int64_t chunks, const T* grad, const T* source, const Pairs& pairs,
           Scratch& scratch) {
    constexpr int64_t C = panel_width<T>();
    const int64_t split = item % splits_, first = item / splits_ / groups_ * height_, group = item / splits_ % groups_;
    const int64_t height = std::min(height_, width_ - first);
    const Range range = panels_of(group);
    Tiles<T>& left = scratch.left;
    T* const right = scratch.right.data();
    T* const sums = local_ ? scratch.sums.data() : sums_.get() + item * size_;
    const int64_t first_chunk = chunks * split / splits_;
    for (int64_t chunk = first_chunk; chunk < chunks * (split + 1) / splits_; ++chunk) {
      const int64_t row = chunk * kChunk;
      left.pack(height, std::min(kChunk, rows - row), grad + row * s_.query_channels + range.group * width_ + first,
                s_.query_channels);
      for (int64_t panel = range.first; panel < range.last; ++panel) {
        const T* const from = source + range.group * panels_.width + panels_.first(panel);
        const int64_t used = panels_.used(panel);
        for (int64_t tap = 0; tap < taps_; ++tap) {
          const auto [count, index, source_of] = pairs(chunk, tap);
          for (int64_t p = 0; p < count; ++p) pack_row(from + source_of(p) * s_.source_channels, used, right + p * C);
          T* const out = direct_ ? weight_ + (range.group * width_ + first) * panels_.width + panels_.first(panel)
                                 : sums + ((panel - range.first) * taps_ + tap) * height_ * C;
          outer(height, left, index, right, count, used, out, direct_ ? panels_.width : C,
                fresh && chunk == first_chunk);
        }
      }
    }
    if (local_)
      for (int64_t unit = 0; unit < group_ * slices(); ++unit) write(item, unit, sums);
  }

  // The weight [query channels, source channels / groups, taps] is written in units of a few rows of one panel, along
  // which the sums lie one after another.
  int64_t units() const { return direct_ || local_ ? 0 : items_ / splits_ * group_ * slices(); }

  void finish(int64_t unit) const {
    const int64_t item = unit / slices() / group_;
    write(item, unit % (slices() * group_), sums_.get() + item * splits_ * size_);
  }

 private:
  static constexpr int64_t kHeight = 16 * kOuterRows, kGroup = 4, kItems = 32, kSlice = 16;

  int64_t slices() const { return (height_ + kSlice - 1) / kSlice; }

  struct Range {
    int64_t group, first, last;  // of channels; panels
  };

  Range panels_of(int64_t group) const {
    const int64_t per = groups_ / s_.groups, first = group / per * panels_.per_group + group % per * group_;
    return {group / per, first, std::min(first + group_, (group / per + 1) * panels_.per_group)};
  }

  // Unit `unit` of an item whose sums, and those of its other splits after them, are at `sums`.
  void write(int64_t item, int64_t unit, const T* sums) const {
    constexpr int64_t C = panel_width<T>(), L = Vector<T>::lanes;
    const int64_t first = item / groups_ * height_, begin = unit % slices() * kSlice;
    const int64_t end = std::min({begin + kSlice, height_, width_ - first});
    const Range range = panels_of(item % groups_);
    const int64_t panel = range.first + unit / slices();
    if (panel >= range.last || begin >= end) return;
    sums += (panel - range.first) * taps_ * height_ * C;
    // Rows are put together in the cache: the overlapping stores of a transpose are slow where they miss it.
    const int64_t row = panels_.used(panel) * taps_;
    std::vector<T> rows((end - begin) * row);
    for (int64_t m = begin; m < end; ++m) {
      T* const to = rows.data() + (m - begin) * row;
      for (int64_t c = 0; c < panels_.used(panel); c += L) {
        for (int64_t t = 0; t < taps_; t += L) {
          const int64_t count = std::min(L, taps_ - t);
          Vec<T> sum[L];
          std::fill_n(sum, L, Vec<T>{});
          for (int64_t i = 0; i < count; ++i)
            for (int64_t split = 0; split < splits_; ++split)
              sum[i] += load(sums + split * size_ + ((t + i) * height_ + m) * C + c);
          if (taps_ == 1)
            store_part(to + c, sum[0], panels_.used(panel) - c);
          else
            store_columns(sum, taps_, panels_.used(panel) - c, count, to + c * taps_ + t);
        }
      }
    }
    for (int64_t m = begin; m < end; ++m)
      std::copy_n(rows.data() + (m - begin) * row, row,
                  weight_ + ((range.group * width_ + first + m) * panels_.width + panels_.first(panel)) * taps_);
  }

  ConvShape s_;
  int64_t taps_;
  T* weight_;  // [query channels, source channels / groups, taps]
  int64_t width_;
  Panels panels_;
  int64_t group_, groups_, height_, splits_, items_, size_;
  bool direct_, local_;  // the sums are the weight itself; or a thread's own, and written by it
  std::unique_ptr<T[]> sums_;
};

// The pairs of `rows` rows with as many others in the same order, for WeightGradient.
struct RowPairs {
  int64_t rows;

  struct Chunk {
    int64_t count;
    const uint16_t* index;
    struct {
      int64_t first;
      int64_t operator()(int64_t p) const { return first + p; }
    } source_of;
  };

  Chunk operator()(int64_t chunk, int64_t) const {
    return {std::min(kChunk, rows - chunk * kChunk), nullptr, {chunk * kChunk}};
  }
};

}  // namespace SPARK_ISA
}  // namespace spark
