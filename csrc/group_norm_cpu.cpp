// Group norm over the rows of each image, which follow one another.
#include <numeric>

#include "norm.h"

namespace spark {
namespace SPARK_ISA {
namespace {

// Channels of whole short rows joined until they fill vectors, so that every number of channels runs in vectors.
template <typename T>
int64_t joined_width(int64_t channels) {
  constexpr int64_t L = Vector<T>::lanes;
  if (channels >= 2 * kJoinVectors * L) return channels;
  const int64_t step = std::max(L, std::lcm(channels, L));
  return (kJoinVectors * L + step - 1) / step * step;
}

// The values of one image: elements from `begin` to `end`, in parts of kFold joined rows.
struct Image {
  int64_t begin, end, width, rows, parts;

  Image(const ImageRows& all, int64_t image, int64_t channels, int64_t width) : width(width) {
    const int64_t row = all.starts[image] * all.area;
    rows = all.starts[image + 1] * all.area - row;
    begin = row * channels;
    end = begin + rows * channels;
    parts = (rows * channels + kFold * width - 1) / (kFold * width);
  }

  int64_t part_begin(int64_t part) const { return begin + part * kFold * width; }
  int64_t part_end(int64_t part) const { return std::min(end, part_begin(part + 1)); }
};

// sums[0, c] and sums[1, c] = sums over an image's rows of the two values that terms(V{}, element, c, first, second)
// gives.
template <typename T, typename Terms>
void sum_image(const Image& image, int64_t channels, Terms terms, std::vector<T>& partial, double* sums,
               [[maybe_unused]] int threads) {
  const int64_t width = image.width;
  partial.assign(image.parts * 2 * width, T(0));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t part = 0; part < image.parts; ++part) {
    T* const to = partial.data() + part * 2 * width;
    add_rows(image.part_begin(part), image.part_end(part), width, terms, to, to + width);
  }
  std::fill_n(sums, 2 * channels, 0.);
  for (int64_t part = 0; part < image.parts; ++part)
    for (int64_t half = 0; half < 2; ++half) {
      const T* const from = partial.data() + (part * 2 + half) * width;
      double* const to = sums + half * channels;
      for (int64_t c = 0; c < width; c += channels)
        for (int64_t k = 0; k < channels; ++k) to[k] += from[c + k];
    }
}

// out[element] = value_of(V{}, element, c), the last rows first: those are the ones that a sum has left in the cache.
template <typename T, typename Value>
void write_image(const Image& image, Value value_of, T* out, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t left = image.parts; left > 0; --left)
    write_rows(image.part_begin(left - 1), image.part_end(left - 1), image.width, value_of, out);
}

// Calls body(c, g) for each channel and its group. One channel in each, as in instance norm, is a loop of its own,
// which the compiler turns into vectors.
template <typename Body>
inline void for_channels(int64_t channels, int64_t groups, Body body) {
  const int64_t size = channels / groups;
  if (size == 1)
    for (int64_t g = 0; g < groups; ++g) body(g, g);
  else
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = g * size; c < (g + 1) * size; ++c) body(c, g);
}

// sums[g] = sum over the group's channels of value_of(c, g).
template <typename Value>
inline void sum_groups(int64_t channels, int64_t groups, Value value_of, std::vector<double>& sums) {
  const int64_t size = channels / groups;
  if (size == 1)
    for (int64_t g = 0; g < groups; ++g) sums[g] = value_of(g, g);
  else
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += value_of(c, g);
      sums[g] = sum;
    }
}

// A value of each channel as one of each element of a joined row.
template <typename T>
struct Joined {
  std::vector<T> values;
  int64_t channels, groups;

  Joined(int64_t channels, int64_t groups, int64_t width) : values(width), channels(channels), groups(groups) {}

  template <typename From>
  const T* fill(From value_of) {
    for_channels(channels, groups, [&](int64_t c, int64_t g) { values[c] = static_cast<T>(value_of(c, g)); });
    for (size_t c = channels; c < values.size(); ++c) values[c] = values[c - channels];
    return values.data();
  }
};

// Threads that take images, and threads that share an image: the former where there are images enough.
struct Threads {
  int across, within;

  Threads(int64_t images, int threads)
      : across(images < 2 * threads ? 1 : threads), within(across == 1 ? threads : 1) {}
};

}  // namespace

template <typename T>
void group_norm_forward(const ImageRows& all, int64_t channels, int64_t groups, const T* x, const T* weight,
                        const T* bias, double eps, T* y, T* mean, T* rstd, int threads) {
  const int64_t width = joined_width<T>(channels), size = channels / groups;
  const Threads use(all.images, threads);
#pragma omp parallel num_threads(use.across)
  {
    std::vector<T> partial;
    std::vector<double> sums(2 * channels), group_means(groups), group_spreads(groups);
    Joined<T> pivots(channels, groups, width), centers = pivots, scales = pivots, biases = pivots;
    const T* const shift = biases.fill([=](int64_t c, int64_t) { return bias ? bias[c] : T(0); });
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < all.images; ++number) {
      const Image image(all, number, channels, width);
      T *const middle = mean + number * groups, *const inverse = rstd + number * groups;
      if (image.begin == image.end) {
        std::fill_n(middle, groups, T(0));
        std::fill_n(inverse, groups, T(1));
        continue;
      }
      const int64_t rows = image.rows, sampled = std::clamp<int64_t>(rows / 8, 1, kPivotRows);
      std::fill_n(sums.begin(), channels, 0.);
      for (int64_t i = 0; i < sampled; ++i) {
        const T* const row = x + image.begin + rows * i / sampled * channels;
        for (int64_t c = 0; c < channels; ++c) sums[c] += row[c];
      }
      const T* const pivot = pivots.fill([&](int64_t c, int64_t) { return sums[c] / sampled; });
      sum_image(
          image, channels,
          [=](auto tag, int64_t i, int64_t c, auto& first, auto& second) {
            typedef decltype(tag) V;
            first = get<V>(x + i) - get<V>(pivot + c);
            second = first * first;
          },
          partial, sums.data(), use.within);
      // Means and squared distances from them: of the channels, then of the groups (Chan, Golub and LeVeque 1979).
      double *const means = sums.data(), *const spreads = means + channels;
      const double share = 1. / rows, values = static_cast<double>(rows * size);
      for (int64_t c = 0; c < channels; ++c) {
        const double off = means[c] * share;
        spreads[c] -= means[c] * off;
        means[c] = pivot[c] + off;
      }
      sum_groups(channels, groups, [=](int64_t c, int64_t) { return means[c] / size; }, group_means);
      sum_groups(
          channels, groups,
          [&](int64_t c, int64_t g) {
            const double away = means[c] - group_means[g];
            return spreads[c] + away * away * rows;
          },
          group_spreads);
      for (int64_t g = 0; g < groups; ++g) {
        const double spread = group_spreads[g] < 0 ? 0 : group_spreads[g];
        middle[g] = static_cast<T>(group_means[g]);
        inverse[g] = static_cast<T>(1 / std::sqrt(spread / values + eps));
      }
      const T* const center = centers.fill([=](int64_t, int64_t g) { return middle[g]; });
      const T* const scale =
          scales.fill([=](int64_t c, int64_t g) { return weight ? weight[c] * inverse[g] : inverse[g]; });
      write_image(
          image,
          [=](auto tag, int64_t i, int64_t c) {
            typedef decltype(tag) V;
            return V((get<V>(x + i) - get<V>(center + c)) * get<V>(scale + c) + get<V>(shift + c));
          },
          y, use.within);
    }
  }
}

template <typename T>
void group_norm_backward(const ImageRows& all, int64_t channels, int64_t groups, const T* dy, const T* x,
                         const T* weight, const T* mean, const T* rstd, T* dx, T* dweight, T* dbias, int threads) {
  const int64_t width = joined_width<T>(channels), size = channels / groups;
  // The gradients of weight and bias are summed over a block of images, then over the blocks.
  const int64_t blocks = std::clamp<int64_t>(all.images, 1, kParts);
  const Threads use(blocks, threads);
  std::vector<double> block_sums(blocks * 2 * channels);
#pragma omp parallel num_threads(use.across)
  {
    std::vector<T> partial;
    std::vector<double> sums(2 * channels), along(groups), level(groups);
    Joined<T> centers(channels, groups, width), scales = centers, slopes = centers, offsets = centers;
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      double* const to = block_sums.data() + block * 2 * channels;
      for (int64_t number = all.images * block / blocks; number < all.images * (block + 1) / blocks; ++number) {
        const Image image(all, number, channels, width);
        if (image.begin == image.end) continue;
        const T *const middle = mean + number * groups, *const inverse = rstd + number * groups;
        const T* const center = centers.fill([=](int64_t, int64_t g) { return middle[g]; });
        sum_image(
            image, channels,
            [=](auto tag, int64_t i, int64_t c, auto& first, auto& second) {
              typedef decltype(tag) V;
              first = get<V>(dy + i);
              second = first * (get<V>(x + i) - get<V>(center + c));
            },
            partial, sums.data(), use.within);
        for_channels(channels, groups, [&](int64_t c, int64_t g) {
          to[c] += sums[channels + c] * inverse[g];
          to[channels + c] += sums[c];
        });
        const double values = static_cast<double>(image.rows * size);
        // dx = rstd * (weight * dy - mean of weight * dy - xhat * mean of weight * dy * xhat)
        const auto factor = [=](int64_t c) { return weight ? static_cast<double>(weight[c]) : 1; };
        sum_groups(channels, groups, [&](int64_t c, int64_t) { return sums[c] * factor(c); }, level);
        sum_groups(channels, groups, [&](int64_t c, int64_t) { return sums[channels + c] * factor(c); }, along);
        for (int64_t g = 0; g < groups; ++g) {
          const double r = inverse[g];
          level[g] *= -r / values;
          along[g] *= -r * r * r / values;
        }
        const T* const scale =
            scales.fill([=](int64_t c, int64_t g) { return weight ? weight[c] * inverse[g] : inverse[g]; });
        const T* const slope = slopes.fill([&](int64_t, int64_t g) { return along[g]; });
        const T* const offset = offsets.fill([&](int64_t, int64_t g) { return level[g]; });
        write_image(
            image,
            [=](auto tag, int64_t i, int64_t c) {
              typedef decltype(tag) V;
              const V rest = (get<V>(x + i) - get<V>(center + c)) * get<V>(slope + c) + get<V>(offset + c);
              return V(get<V>(dy + i) * get<V>(scale + c) + rest);
            },
            dx, use.within);
      }
    }
  }
  add_parts(blocks, 2 * channels, block_sums);
  std::copy_n(block_sums.begin(), channels, dweight);
  std::copy_n(block_sums.begin() + channels, channels, dbias);
}

#define SPARK_INSTANTIATE(T)                                                                                        \
  template void group_norm_forward<T>(const ImageRows&, int64_t, int64_t, const T*, const T*, const T*, double, T*, \
                                      T*, T*, int);                                                                 \
  template void group_norm_backward<T>(const ImageRows&, int64_t, int64_t, const T*, const T*, const T*, const T*,  \
                                       const T*, T*, T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
