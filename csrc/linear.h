// y = x times the transposed weight, plus bias: a matrix product of packed rows. Each item of work packs one panel of
// the weight into its own cache and runs all its rows through it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "gemm.h"

namespace spark {
namespace SPARK_ISA {

template <typename T>
class Product {
 public:
  static constexpr int64_t kBlock = 8 * kTileRows;  // rows that are finished together, in the nearest cache

  // What a thread works with.
  struct Scratch {
    std::vector<T> packed, sums;
  };

  // x [rows, depth], y [rows, width], weight [width, depth] or, `transposed`, [depth, width]; bias may be null.
  Product(int64_t rows, int64_t depth, int64_t width, const T* x, const T* weight, bool transposed, const T* bias, T* y,
          int64_t threads)
      : rows_(rows), depth_(depth), width_(width), x_(x), weight_(weight), transposed_(transposed), bias_(bias), y_(y),
        panels_(depth, width, 1, panel_width<T>()) {
    if (!rows || !width) return;
    const int64_t wanted = std::max<int64_t>(1, 4 * threads / panels_.total) * kBlock;
    chunk_ = std::min(kMostRows, (rows + wanted - 1) / wanted * kBlock);
    items_ = (rows + chunk_ - 1) / chunk_ * panels_.total;
  }

  int64_t items() const { return items_; }

  // `finish(row, count, column, used, values, stride)` is called for each block of kBlock rows and each panel, once its
  // values are ready: rows `stride` apart, of which the first `used` belong to y from `column` on, and as many follow
  // as fill the panel. It may change them. With nullptr nothing is called.
  template <typename Finish>
  void run(int64_t item, Scratch& scratch, Finish finish) const {
    constexpr int64_t C = panel_width<T>();
    constexpr bool plain = std::is_same_v<Finish, std::nullptr_t>;
    const int64_t panel = item % panels_.total, begin = item / panels_.total * chunk_;
    const int64_t count = std::min(rows_ - begin, chunk_), used = panels_.used(panel), column = panels_.first(panel);
    scratch.packed.resize(std::min(depth_, kDepth) * C);
    // A whole panel accumulates where its result belongs; a narrower one in a buffer of its own.
    const bool direct = used == C;
    if (!direct) scratch.sums.resize(chunk_ * C);
    T* const out = direct ? y_ + begin * width_ + column : scratch.sums.data();
    const int64_t stride = direct ? width_ : C;
    const BiasRow<T> start(bias_, column, used);
    if (!depth_)
      for (int64_t i = 0; i < count; ++i) std::copy_n(start.values, C, out + i * stride);
    for (int64_t k = 0; k == 0 || k < depth_; k += kDepth) {
      const int64_t part = std::min(kDepth, depth_ - k);
      pack(k, part, column, used, scratch.packed.data());
      const int64_t block = plain || k + part < depth_ ? count : kBlock;
      for (int64_t row = 0; row < count; row += block) {
        const int64_t here = std::min(block, count - row);
        const T* const from = x_ + (begin + row) * depth_ + k;
        T* const to = out + row * stride;
        if (part)
          multiply<T>(
              here, part, scratch.packed.data(), used, k ? nullptr : start.values,
              [&](int64_t i) { return from + i * depth_; }, [&](int64_t i) { return to + i * stride; });
        if constexpr (!plain)
          if (k + part == depth_) finish(begin + row, here, column, used, to, stride);
      }
    }
    if (!direct)
      for (int64_t i = 0; i < count; ++i) std::copy_n(out + i * C, used, y_ + (begin + i) * width_ + column);
  }

 private:
  static constexpr int64_t kDepth = 512;
  static constexpr int64_t kMostRows = 10 * kBlock;  // that share a packed panel

  void pack(int64_t k, int64_t part, int64_t column, int64_t used, T* packed) const {
    constexpr int64_t C = panel_width<T>(), L = Vector<T>::lanes;
    if (transposed_) {
      for (int64_t j = 0; j < part; ++j) {
        const T* from = weight_ + (k + j) * width_ + column;
        for (int64_t c = 0; c < C; ++c) packed[j * C + c] = c < used ? from[c] : T(0);
      }
    } else {
      for (int64_t j = 0; j < part; j += L) {
        for (int64_t c = 0; c < C; c += L) {
          Vec<T> m[L];
          load_columns(weight_ + (column + c) * depth_ + k + j, depth_, used - c, part - j, weight_ + width_ * depth_,
                       m);
          for (int64_t i = 0; i < std::min<int64_t>(L, part - j); ++i) store(packed + (j + i) * C + c, m[i]);
        }
      }
    }
  }

  int64_t rows_, depth_, width_;
  const T *x_, *weight_;
  bool transposed_;
  const T* bias_;
  T* y_;
  Panels panels_;
  int64_t chunk_ = 0, items_ = 0;
};

}  // namespace SPARK_ISA
}  // namespace spark
