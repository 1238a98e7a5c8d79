// The Python module spark_fast._native. Arguments are addresses and sizes; Python has validated them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace py = pybind11;

namespace {

using spark::ConvShape;
using spark::Geometry;

enum class Isa { portable, avx2, avx512 };

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef SPARK_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
#endif
#ifdef SPARK_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
#endif
  return Isa::portable;
}

Isa current_isa = best_isa();

const char* isa_name() {
  return current_isa == Isa::avx512 ? "avx512" : current_isa == Isa::avx2 ? "avx2" : "portable";
}

// Tests run every instruction set that this build and this machine have.
void set_isa(const std::string& name) {
  const Isa wanted = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::portable;
  if (wanted > best_isa() || (name != "avx512" && name != "avx2" && name != "portable"))
    throw py::value_error("this build on this machine has no instruction set '" + name + "'");
#ifndef SPARK_HAS_AVX2
  if (wanted == Isa::avx2) throw py::value_error("this build has no instruction set 'avx2'");
#endif
  current_isa = wanted;
}

// Calls `kernel` of the namespace of the current instruction set.
#ifdef SPARK_HAS_AVX512
#define SPARK_AVX512_CASE(...) \
  if (current_isa == Isa::avx512) return spark::avx512::__VA_ARGS__;
#else
#define SPARK_AVX512_CASE(...)
#endif
#ifdef SPARK_HAS_AVX2
#define SPARK_AVX2_CASE(...) \
  if (current_isa == Isa::avx2) return spark::avx2::__VA_ARGS__;
#else
#define SPARK_AVX2_CASE(...)
#endif
#define SPARK_DISPATCH(...)      \
  SPARK_AVX512_CASE(__VA_ARGS__) \
  SPARK_AVX2_CASE(__VA_ARGS__)   \
  return spark::portable::__VA_ARGS__

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (coords, patches, query height, width, source height, width, grid_to_patch, gh, gw, kh, kw, y grid, y in, y length,
// x grid, x in, x length)
Geometry geometry(const py::tuple& t) {
  const auto number = [&](int i) { return t[i].cast<int64_t>(); };
  const auto table = [&](int i) { return at<const int32_t>(t[i].cast<Address>()); };
  if (t.size() != 17) throw py::value_error("a geometry has 17 entries");
  return {table(0),
          number(1),
          {number(2), number(3)},
          {number(4), number(5)},
          table(6),
          number(7),
          number(8),
          number(9),
          number(10),
          {table(11), table(12), number(13)},
          {table(14), table(15), number(16)}};
}

// (stride, padding, dilation, transposed), along x
spark::WindowX window_x(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<bool>()};
}

// Runs `call(T{})` with T = float or double, without the interpreter lock.
template <typename Call>
void with_type(int64_t element_size, Call call) {
  py::gil_scoped_release release;
  if (element_size == 4)
    call(float{});
  else
    call(double{});
}

void conv_gather(const py::tuple& where, int64_t element_size, int64_t source_channels, int64_t query_channels,
                 int64_t groups, Address source, Address weight, bool transposed, Address bias, Address query,
                 int threads) {
  const Geometry g = geometry(where);
  const ConvShape s{source_channels, query_channels, groups};
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(conv_gather<T>(g, s, at<const T>(source), at<const T>(weight), transposed, at<const T>(bias),
                                  at<T>(query), threads));
  });
}

void conv_grad_weight(const py::tuple& where, int64_t element_size, int64_t source_channels, int64_t query_channels,
                      int64_t groups, Address source, Address grad, Address weight, int threads) {
  const Geometry g = geometry(where);
  const ConvShape s{source_channels, query_channels, groups};
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(conv_grad_weight<T>(g, s, at<const T>(source), at<const T>(grad), at<T>(weight), threads));
  });
}

void winograd_forward(const py::tuple& where, int64_t element_size, int64_t source_channels, int64_t query_channels,
                      int64_t source_cell, int64_t query_cell, Address source, Address weight, bool transposed,
                      Address bias, Address query, int threads) {
  const Geometry g = geometry(where);
  const ConvShape s{source_channels, query_channels, 1, source_cell, query_cell};
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(winograd_forward<T>(g, s, at<const T>(source), at<const T>(weight), transposed, at<const T>(bias),
                                       at<T>(query), threads));
  });
}

void winograd_grad_weight(const py::tuple& where, int64_t element_size, int64_t source_channels, int64_t query_channels,
                          int64_t source_cell, int64_t query_cell, Address source, Address grad, Address weight,
                          int threads) {
  const Geometry g = geometry(where);
  const ConvShape s{source_channels, query_channels, 1, source_cell, query_cell};
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(winograd_grad_weight<T>(g, s, at<const T>(source), at<const T>(grad), at<T>(weight), threads));
  });
}

void linear_forward(int64_t element_size, int64_t rows, int64_t depth, int64_t width, Address x, Address weight,
                    bool transposed, Address bias, Address y, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(linear_forward<T>(rows, depth, width, at<const T>(x), at<const T>(weight), transposed,
                                     at<const T>(bias), at<T>(y), threads));
  });
}

void linear_grad_weight(int64_t element_size, int64_t rows, int64_t depth, int64_t width, Address x, Address grad,
                        Address weight, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(
        linear_grad_weight<T>(rows, depth, width, at<const T>(x), at<const T>(grad), at<T>(weight), threads));
  });
}

void mlp_forward(int64_t element_size, int64_t rows, int64_t channels, int64_t width, int64_t outputs, Address x,
                 Address weight1, Address bias1, Address weight2, Address bias2, Address hidden, Address y,
                 int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(mlp_forward<T>(rows, channels, width, outputs, at<const T>(x), at<const T>(weight1),
                                  at<const T>(bias1), at<const T>(weight2), at<const T>(bias2), at<T>(hidden), at<T>(y),
                                  threads));
  });
}

void mlp_backward(int64_t element_size, int64_t rows, int64_t channels, int64_t width, int64_t outputs, Address dy,
                  Address x, Address hidden, Address weight1, Address weight2, Address dx, Address dweight1,
                  Address dbias1, Address dweight2, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(mlp_backward<T>(rows, channels, width, outputs, at<const T>(dy), at<const T>(x), at<const T>(hidden),
                                   at<const T>(weight1), at<const T>(weight2), at<T>(dx), at<T>(dweight1),
                                   at<T>(dbias1), at<T>(dweight2), threads));
  });
}

void depthwise_gather(const py::tuple& where, const py::tuple& window, int64_t element_size, int64_t channels,
                      Address source, Address weight, Address bias, Address query, int threads) {
  const Geometry g = geometry(where);
  const spark::WindowX x = window_x(window);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(depthwise_gather<T>(g, x, channels, at<const T>(source), at<const T>(weight), at<const T>(bias),
                                       at<T>(query), threads));
  });
}

void depthwise_grad_weight(const py::tuple& where, const py::tuple& window, int64_t element_size, int64_t channels,
                           Address source, Address query, Address grad, int threads) {
  const Geometry g = geometry(where);
  const spark::WindowX x = window_x(window);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(
        depthwise_grad_weight<T>(g, x, channels, at<const T>(source), at<const T>(query), at<T>(grad), threads));
  });
}

void max_pool_forward(const py::tuple& where, int64_t element_size, int64_t channels, Address source, Address query,
                      Address argmax, int threads) {
  const Geometry g = geometry(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(max_pool_forward<T>(g, channels, at<const T>(source), at<T>(query), at<int16_t>(argmax), threads));
  });
}

void max_pool_grad_input(const py::tuple& where, int64_t element_size, int64_t channels, Address grad, Address argmax,
                         Address query, int threads) {
  const Geometry g = geometry(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(
        max_pool_grad_input<T>(g, channels, at<const T>(grad), at<const int16_t>(argmax), at<T>(query), threads));
  });
}

void batch_statistics(int64_t element_size, int64_t rows, int64_t channels, Address x, double momentum, double eps,
                      Address running_mean, Address running_var, Address mean, Address rstd, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(batch_statistics<T>(rows, channels, at<const T>(x), momentum, eps, at<T>(running_mean),
                                       at<T>(running_var), at<T>(mean), at<T>(rstd), threads));
  });
}

void batch_apply(int64_t element_size, int64_t rows, int64_t channels, Address x, Address residual, Address mean,
                 Address rstd, Address weight, Address bias, int activation, Address y, int threads) {
  const auto act = static_cast<spark::Activation>(activation);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(batch_apply<T>(rows, channels, at<const T>(x), at<const T>(residual), at<const T>(mean),
                                  at<const T>(rstd), at<const T>(weight), at<const T>(bias), act, at<T>(y), threads));
  });
}

void batch_norm_backward(int64_t element_size, int64_t rows, int64_t channels, Address dy, Address x, Address residual,
                         Address weight, Address bias, Address mean, Address rstd, bool training, int activation,
                         Address dx, Address dresidual, Address dweight, Address dbias, int threads) {
  const auto act = static_cast<spark::Activation>(activation);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(batch_norm_backward<T>(rows, channels, at<const T>(dy), at<const T>(x), at<const T>(residual),
                                          at<const T>(weight), at<const T>(bias), at<const T>(mean), at<const T>(rstd),
                                          training, act, at<T>(dx), at<T>(dresidual), at<T>(dweight), at<T>(dbias),
                                          threads));
  });
}

void layer_norm_forward(int64_t element_size, int64_t rows, int64_t channels, Address x, Address weight, Address bias,
                        double eps, Address y, Address mean, Address rstd, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(layer_norm_forward<T>(rows, channels, at<const T>(x), at<const T>(weight), at<const T>(bias), eps,
                                         at<T>(y), at<T>(mean), at<T>(rstd), threads));
  });
}

void layer_norm_backward(int64_t element_size, int64_t rows, int64_t channels, Address dy, Address x, Address weight,
                         Address mean, Address rstd, Address dx, Address dweight, Address dbias, int threads) {
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(layer_norm_backward<T>(rows, channels, at<const T>(dy), at<const T>(x), at<const T>(weight),
                                          at<const T>(mean), at<const T>(rstd), at<T>(dx), at<T>(dweight), at<T>(dbias),
                                          threads));
  });
}

// (starts, images, area)
spark::ImageRows image_rows(const py::tuple& t) {
  return {at<const int64_t>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

void group_norm_forward(const py::tuple& where, int64_t element_size, int64_t channels, int64_t groups, Address x,
                        Address weight, Address bias, double eps, Address y, Address mean, Address rstd, int threads) {
  const spark::ImageRows rows = image_rows(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(group_norm_forward<T>(rows, channels, groups, at<const T>(x), at<const T>(weight), at<const T>(bias),
                                         eps, at<T>(y), at<T>(mean), at<T>(rstd), threads));
  });
}

void group_norm_backward(const py::tuple& where, int64_t element_size, int64_t channels, int64_t groups, Address dy,
                         Address x, Address weight, Address mean, Address rstd, Address dx, Address dweight,
                         Address dbias, int threads) {
  const spark::ImageRows rows = image_rows(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(group_norm_backward<T>(rows, channels, groups, at<const T>(dy), at<const T>(x), at<const T>(weight),
                                          at<const T>(mean), at<const T>(rstd), at<T>(dx), at<T>(dweight), at<T>(dbias),
                                          threads));
  });
}

// (coords, patches, channels, side, 4 strides of the images, 4 strides of the prediction)
spark::PatchGrid patch_grid(const py::tuple& t) {
  const auto number = [&](int i) { return t[i].cast<int64_t>(); };
  return {at<const int32_t>(t[0].cast<Address>()),
          number(1),
          number(2),
          number(3),
          {number(4), number(5), number(6), number(7)},
          {number(8), number(9), number(10), number(11)}};
}

void patch_loss_forward(const py::tuple& where, int64_t element_size, Address images, Address prediction, double eps,
                        Address error, Address mean, Address root, int threads) {
  const spark::PatchGrid g = patch_grid(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(patch_loss_forward<T>(g, at<const T>(images), at<const T>(prediction), eps, at<double>(error),
                                         at<T>(mean), at<T>(root), threads));
  });
}

void patch_loss_grad(const py::tuple& where, int64_t element_size, Address images, Address prediction, Address mean,
                     Address root, double scale, Address grad, int threads) {
  const spark::PatchGrid g = patch_grid(where);
  with_type(element_size, [&](auto type) {
    typedef decltype(type) T;
    SPARK_DISPATCH(patch_loss_grad<T>(g, at<const T>(images), at<const T>(prediction), at<const T>(mean),
                                      at<const T>(root), scale, at<T>(grad), threads));
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of spark_fast. See spark_fast/ops/*/cpu.py for the launchers.";
  m.def("isa", &isa_name, "Instruction set in use.");
  m.def("set_isa", &set_isa);
  m.def("openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
  // Freed memory stays with the process: no mmap for large blocks, no trimming of the heap.
  m.def("keep_memory", [] {
#ifdef __GLIBC__
    return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1 && mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
    return false;
#endif
  });
  m.def("conv_gather", &conv_gather);
  m.def("conv_grad_weight", &conv_grad_weight);
  m.def("winograd_forward", &winograd_forward);
  m.def("winograd_grad_weight", &winograd_grad_weight);
  m.def("linear_forward", &linear_forward);
  m.def("linear_grad_weight", &linear_grad_weight);
  m.def("mlp_forward", &mlp_forward);
  m.def("mlp_backward", &mlp_backward);
  m.def("patch_loss_forward", &patch_loss_forward);
  m.def("patch_loss_grad", &patch_loss_grad);
  m.def("depthwise_gather", &depthwise_gather);
  m.def("depthwise_grad_weight", &depthwise_grad_weight);
  m.def("batch_statistics", &batch_statistics);
  m.def("batch_apply", &batch_apply);
  m.def("batch_norm_backward", &batch_norm_backward);
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("group_norm_forward", &group_norm_forward);
  m.def("group_norm_backward", &group_norm_backward);
  m.def("max_pool_forward", &max_pool_forward);
  m.def("max_pool_grad_input", &max_pool_grad_input);
}
