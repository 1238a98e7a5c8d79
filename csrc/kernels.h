// The CPU kernels' signatures. T is float or double; `threads` is the caller's (torch's) thread count.
#pragma once

#include <cstdint>

#include "window.h"

namespace spark {

struct ConvShape {
  int64_t source_channels, query_channels;  // of all groups together
  int64_t groups;
};

// The same kernels in one namespace per instruction set; see simd.h.
#define SPARK_DECLARE_KERNELS(ISA)                                                                                    \
  namespace ISA {                                                                                                     \
  int64_t panel_columns(int64_t element_size);                                                                        \
  /* query[q] = bias + sum over taps of source[source_row(q, tap)] times the tap's matrix, per group. */              \
  /* packed: [groups, panels, taps, source channels / groups, panel columns], see pack_weight. */                     \
  template <typename T>                                                                                               \
  void conv_gather_gemm(const Geometry&, const ConvShape&, const T* source, const T* packed, const T* bias, T* query, \
                        int threads);                                                                                 \
  /* packed[..., k, c] = sum over (source row s, query row q) of the tap of source[s, k] * query[q, c]. */            \
  template <typename T>                                                                                               \
  void conv_grad_weight(const Geometry&, const ConvShape&, const T* source, const T* query, T* packed, int threads);  \
  /* weight [out channels, in channels / groups, taps] <-> packed; `transposed` packs for the gradient of the */      \
  /* input, whose source channels are the convolution's output channels. */                                           \
  template <typename T>                                                                                               \
  void pack_weight(const ConvShape&, int64_t taps, bool transposed, const T* weight, T* packed, int threads);         \
  template <typename T>                                                                                               \
  void unpack_weight(const ConvShape&, int64_t taps, const T* packed, T* weight, int threads);                        \
  /* query[q, c] = bias[c] + sum over taps of source[row, c] * weight[tap, c]. */                                     \
  template <typename T>                                                                                               \
  void depthwise_gather(const Geometry&, int64_t channels, const T* source, const T* weight, const T* bias, T* query, \
                        int threads);                                                                                 \
  /* grad[tap, c] = sum over query rows of source[row, c] * query[q, c]. */                                           \
  template <typename T>                                                                                               \
  void depthwise_grad_weight(const Geometry&, int64_t channels, const T* source, const T* query, T* grad,             \
                             int threads);                                                                            \
  /* Masked neighbours count as 0, the border as -inf; argmax[q, c] is the winning tap. */                            \
  template <typename T>                                                                                               \
  void max_pool_forward(const Geometry&, int64_t channels, const T* source, T* query, int16_t* argmax, int threads);  \
  /* `g` is transposed: query rows are the pool's input rows. */                                                      \
  template <typename T>                                                                                               \
  void max_pool_grad_input(const Geometry& g, int64_t channels, const T* grad, const int16_t* argmax, T* query,       \
                           int threads);                                                                              \
  }

SPARK_DECLARE_KERNELS(portable)
#ifdef SPARK_HAS_AVX2
SPARK_DECLARE_KERNELS(avx2)
#endif
#ifdef SPARK_HAS_AVX512
SPARK_DECLARE_KERNELS(avx512)
#endif

}  // namespace spark
