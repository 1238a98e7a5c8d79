// spark_fast._native_cuda: addresses, sizes and a stream as integers. The callers in spark_fast/ops/*/cuda.py validate.
#include <pybind11/pybind11.h>

#include <tuple>

#include "kernels_cuda.h"

namespace py = pybind11;

#ifndef SPARK_CUDA_ARCHS
#define SPARK_CUDA_ARCHS "cpu"  // the kernels on csrc/cuda_shim
#endif

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using StrideArgs = std::tuple<int64_t, int64_t, int64_t, int64_t>;

spark::Strides strides_of(const StrideArgs& args) {
  const auto [b, c, y, x] = args;
  return {b, c, y, x};
}

void gather(int device, uintptr_t stream, int64_t element_size, uintptr_t image, const StrideArgs& strides,
            uintptr_t coords, int64_t patches, int64_t side, int64_t channels, uintptr_t rows) {
  spark::gather_patches({device, stream}, element_size, pointer<const void>(image), strides_of(strides),
                        pointer<const int32_t>(coords), patches, side, channels, pointer<void>(rows));
}

void scatter(int device, uintptr_t stream, int64_t element_size, uintptr_t rows, uintptr_t fill,
             uintptr_t grid_to_patch, int64_t batch, int64_t gh, int64_t gw, int64_t side, int64_t channels,
             uintptr_t dense) {
  spark::scatter_patches({device, stream}, element_size, pointer<const void>(rows), pointer<const void>(fill),
                         pointer<const int32_t>(grid_to_patch), batch, gh, gw, side, channels, pointer<void>(dense));
}

using MapArgs = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using WindowArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

spark::PatchMap map_of(const MapArgs& args) {
  const auto [coords, patches, grid_to_patch, batch, gh, gw, height, width] = args;
  return {pointer<const int32_t>(coords), patches, pointer<const int32_t>(grid_to_patch), batch, gh, gw, height, width};
}

spark::Window window_of(const WindowArgs& args) {
  const auto [ky, kx, sy, sx, py, px, dy, dx] = args;
  return {ky, kx, sy, sx, py, px, dy, dx};
}

spark::FloatType type_of(int type) { return static_cast<spark::FloatType>(type); }

void gather_depthwise(int device, uintptr_t stream, int type, const MapArgs& source_map, const MapArgs& query_map,
                      const WindowArgs& window, bool transposed, int64_t channels, uintptr_t source, uintptr_t weight,
                      uintptr_t bias, uintptr_t query) {
  spark::depthwise_gather({device, stream}, type_of(type), map_of(source_map), map_of(query_map), window_of(window),
                          transposed, channels, pointer<const void>(source), pointer<const void>(weight),
                          pointer<const void>(bias), pointer<void>(query));
}

int64_t parts_depthwise(int type, const MapArgs& source_map, const MapArgs& query_map, const WindowArgs& window,
                        int64_t channels) {
  return spark::depthwise_parts(type_of(type), map_of(source_map), map_of(query_map), window_of(window), channels);
}

void grad_weight_depthwise(int device, uintptr_t stream, int type, const MapArgs& source_map, const MapArgs& query_map,
                           const WindowArgs& window, int64_t channels, uintptr_t source, uintptr_t query,
                           uintptr_t sums, int64_t parts, uintptr_t weight) {
  spark::depthwise_grad_weight({device, stream}, type_of(type), map_of(source_map), map_of(query_map),
                               window_of(window), channels, pointer<const void>(source), pointer<const void>(query),
                               pointer<float>(sums), parts, pointer<void>(weight));
}

void forward_max_pool(int device, uintptr_t stream, int type, const MapArgs& source_map, const MapArgs& query_map,
                      const WindowArgs& window, int64_t channels, uintptr_t source, uintptr_t query, uintptr_t argmax) {
  spark::max_pool_forward({device, stream}, type_of(type), map_of(source_map), map_of(query_map), window_of(window),
                          channels, pointer<const void>(source), pointer<void>(query), pointer<int16_t>(argmax));
}

void grad_input_max_pool(int device, uintptr_t stream, int type, const MapArgs& source_map, const MapArgs& query_map,
                         const WindowArgs& window, int64_t channels, uintptr_t source, uintptr_t argmax,
                         uintptr_t query) {
  spark::max_pool_grad_input({device, stream}, type_of(type), map_of(source_map), map_of(query_map), window_of(window),
                             channels, pointer<const void>(source), pointer<const int16_t>(argmax),
                             pointer<void>(query));
}

void forward_patch_loss(int device, uintptr_t stream, int images_type, int prediction_type, const MapArgs& masked,
                        int64_t channels, const StrideArgs& image_strides, const StrideArgs& prediction_strides,
                        uintptr_t images, uintptr_t prediction, double eps, uintptr_t error, uintptr_t mean,
                        uintptr_t inverse, uintptr_t loss) {
  spark::patch_loss_forward({device, stream}, type_of(images_type), type_of(prediction_type), map_of(masked), channels,
                            strides_of(image_strides), strides_of(prediction_strides), pointer<const void>(images),
                            pointer<const void>(prediction), eps, pointer<float>(error), pointer<float>(mean),
                            pointer<float>(inverse), pointer<float>(loss));
}

void grad_patch_loss(int device, uintptr_t stream, int images_type, int prediction_type, const MapArgs& masked,
                     int64_t channels, const StrideArgs& image_strides, const StrideArgs& prediction_strides,
                     uintptr_t images, uintptr_t prediction, uintptr_t mean, uintptr_t inverse, uintptr_t upstream,
                     bool channels_last, uintptr_t gradient) {
  spark::patch_loss_grad({device, stream}, type_of(images_type), type_of(prediction_type), map_of(masked), channels,
                         strides_of(image_strides), strides_of(prediction_strides), pointer<const void>(images),
                         pointer<const void>(prediction), pointer<const float>(mean), pointer<const float>(inverse),
                         pointer<const float>(upstream), channels_last, pointer<void>(gradient));
}

void gather_conv(int device, uintptr_t stream, int type, const MapArgs& map, int64_t channels, int64_t columns,
                 bool turned, uintptr_t source, uintptr_t weight, uintptr_t bias, uintptr_t out) {
  spark::conv_gather({device, stream}, type_of(type), map_of(map), channels, columns, turned,
                     pointer<const void>(source), pointer<const void>(weight), pointer<const void>(bias),
                     pointer<void>(out));
}

int64_t weight_parts_conv(int device, const MapArgs& map, int64_t channels, int64_t columns) {
  return spark::conv_weight_parts(device, map_of(map), channels, columns);
}

void weight_conv(int device, uintptr_t stream, int type, const MapArgs& map, int64_t channels, int64_t columns,
                 uintptr_t source, uintptr_t grad, uintptr_t partial, int64_t parts, uintptr_t out) {
  spark::conv_weight({device, stream}, type_of(type), map_of(map), channels, columns, pointer<const void>(source),
                     pointer<const void>(grad), pointer<float>(partial), parts, pointer<void>(out));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  using py::arg;
  m.doc() = "CUDA kernels of spark_fast";
  m.attr("archs") = SPARK_CUDA_ARCHS;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();  // a full launch queue blocks
  m.def("check_device", &spark::check_device, arg("device"), unlocked);
  m.def("gather_patches", &gather, arg("device"), arg("stream"), arg("element_size"), arg("image"), arg("strides"),
        arg("coords"), arg("patches"), arg("side"), arg("channels"), arg("rows"), unlocked);
  m.def("scatter_patches", &scatter, arg("device"), arg("stream"), arg("element_size"), arg("rows"), arg("fill"),
        arg("grid_to_patch"), arg("batch"), arg("gh"), arg("gw"), arg("side"), arg("channels"), arg("dense"), unlocked);

  m.def("depthwise_gather", &gather_depthwise, arg("device"), arg("stream"), arg("type"), arg("source_map"),
        arg("query_map"), arg("window"), arg("transposed"), arg("channels"), arg("source"), arg("weight"), arg("bias"),
        arg("query"), unlocked);
  m.def("depthwise_parts", &parts_depthwise, arg("type"), arg("source_map"), arg("query_map"), arg("window"),
        arg("channels"));
  m.def("depthwise_grad_weight", &grad_weight_depthwise, arg("device"), arg("stream"), arg("type"), arg("source_map"),
        arg("query_map"), arg("window"), arg("channels"), arg("source"), arg("query"), arg("sums"), arg("parts"),
        arg("weight"), unlocked);
  m.def("max_pool_forward", &forward_max_pool, arg("device"), arg("stream"), arg("type"), arg("source_map"),
        arg("query_map"), arg("window"), arg("channels"), arg("source"), arg("query"), arg("argmax"), unlocked);
  m.def("max_pool_grad_input", &grad_input_max_pool, arg("device"), arg("stream"), arg("type"), arg("source_map"),
        arg("query_map"), arg("window"), arg("channels"), arg("source"), arg("argmax"), arg("query"), unlocked);
  m.def("patch_loss_forward", &forward_patch_loss, arg("device"), arg("stream"), arg("images_type"),
        arg("prediction_type"), arg("masked"), arg("channels"), arg("image_strides"), arg("prediction_strides"),
        arg("images"), arg("prediction"), arg("eps"), arg("error"), arg("mean"), arg("inverse"), arg("loss"), unlocked);
  m.def("patch_loss_grad", &grad_patch_loss, arg("device"), arg("stream"), arg("images_type"), arg("prediction_type"),
        arg("masked"), arg("channels"), arg("image_strides"), arg("prediction_strides"), arg("images"),
        arg("prediction"), arg("mean"), arg("inverse"), arg("upstream"), arg("channels_last"), arg("gradient"),
        unlocked);

  m.def("conv_gather", &gather_conv, arg("device"), arg("stream"), arg("type"), arg("map"), arg("channels"),
        arg("columns"), arg("turned"), arg("source"), arg("weight"), arg("bias"), arg("out"), unlocked);
  m.def("conv_weight_parts", &weight_parts_conv, arg("device"), arg("map"), arg("channels"), arg("columns"));
  m.def("conv_weight", &weight_conv, arg("device"), arg("stream"), arg("type"), arg("map"), arg("channels"),
        arg("columns"), arg("source"), arg("grad"), arg("partial"), arg("parts"), arg("out"), unlocked);
}
