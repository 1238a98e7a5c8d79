// The signatures of the kernels, for one instruction set: kernels.h includes this once for each, as namespace
// SPARK_KERNELS.
namespace SPARK_KERNELS {

// query[q] = bias + sum over taps of source[source_row(q, tap)] times the tap's matrix, per group. The weight is
// [query channels, source channels / groups, taps]; `transposed`: [source channels, query channels / groups,
// taps], which is the gradient of the input, whose source channels are the convolution's output channels.
template <typename T>
void conv_gather(const Geometry&, const ConvShape&, const T* source, const T* weight, bool transposed, const T* bias,
                 T* query, int threads);

// weight[o, i, tap] = sum over the pairs (source row s, query row q) of the tap of grad[q, o] * source[s, i].
template <typename T>
void conv_grad_weight(const Geometry&, const ConvShape&, const T* source, const T* grad, T* weight, int threads);

// The same two for at most kFewChannels source channels per group, which the former call.
template <typename T>
void conv_unfolded(const Geometry&, const ConvShape&, const T* source, const T* weight, const T* bias, T* query,
                   int threads);
template <typename T>
void conv_unfolded_grad_weight(const Geometry&, const ConvShape&, const T* source, const T* grad, T* weight,
                               int threads);

// conv_gather and conv_grad_weight for 3x3 kernels of stride 1, padding 1 and one group, where the query's patches
// are of even height and width. The geometry is the forward one, `transposed` or not.
template <typename T>
void winograd_forward(const Geometry&, const ConvShape&, const T* source, const T* weight, bool transposed,
                      const T* bias, T* query, int threads);
template <typename T>
void winograd_grad_weight(const Geometry&, const ConvShape&, const T* source, const T* grad, T* weight, int threads);

// y [rows, width] = x [rows, depth] times the transpose of weight [width, depth], plus bias; `transposed`: times
// weight [depth, width].
template <typename T>
void linear_forward(int64_t rows, int64_t depth, int64_t width, const T* x, const T* weight, bool transposed,
                    const T* bias, T* y, int threads);

// weight [width, depth] = grad [rows, width] transposed, times x [rows, depth].
template <typename T>
void linear_grad_weight(int64_t rows, int64_t depth, int64_t width, const T* x, const T* grad, T* weight, int threads);

// y [rows, outputs] = weight2 [outputs, width] times the exact GELU of hidden [rows, width] = weight1 [width, channels]
// times x [rows, channels], row by row, with biases. The biases and `hidden` may be null.
template <typename T>
void mlp_forward(int64_t rows, int64_t channels, int64_t width, int64_t outputs, const T* x, const T* weight1,
                 const T* bias1, const T* weight2, const T* bias2, T* hidden, T* y, int threads);

// Each gradient may be null; x is read for dweight1 and weight1 for dx.
template <typename T>
void mlp_backward(int64_t rows, int64_t channels, int64_t width, int64_t outputs, const T* dy, const T* x,
                  const T* hidden, const T* weight1, const T* weight2, T* dx, T* dweight1, T* dbias1, T* dweight2,
                  int threads);

// query[q, c] = bias[c] + sum over taps of source[row, c] * weight[tap, c].
template <typename T>
void depthwise_gather(const Geometry&, const WindowX&, int64_t channels, const T* source, const T* weight,
                      const T* bias, T* query, int threads);

// grad[tap, c] = sum over query rows of source[row, c] * query[q, c].
template <typename T>
void depthwise_grad_weight(const Geometry&, const WindowX&, int64_t channels, const T* source, const T* query, T* grad,
                           int threads);

// Masked neighbours count as 0, the border as -inf; argmax[q, c] is the winning tap.
template <typename T>
void max_pool_forward(const Geometry&, int64_t channels, const T* source, T* query, int16_t* argmax, int threads);

// `g` is transposed: query rows are the pool's input rows.
template <typename T>
void max_pool_grad_input(const Geometry& g, int64_t channels, const T* grad, const int16_t* argmax, T* query,
                         int threads);

// mean and 1 / deviation (rstd) [channels] of x [rows, channels]; the running statistics, each of which may be null,
// are updated.
template <typename T>
void batch_statistics(int64_t rows, int64_t channels, const T* x, double momentum, double eps, T* running_mean,
                      T* running_var, T* mean, T* rstd, int threads);

// y = activation((x - mean) * rstd * weight + bias + residual), each of which may be null: 0, or 1 of a factor.
template <typename T>
void batch_apply(int64_t rows, int64_t channels, const T* x, const T* residual, const T* mean, const T* rstd,
                 const T* weight, const T* bias, Activation, T* y, int threads);

// dx may be null, and mean and rstd without `training`. dresidual is written if there is a residual.
template <typename T>
void batch_norm_backward(int64_t rows, int64_t channels, const T* dy, const T* x, const T* residual, const T* weight,
                         const T* bias, const T* mean, const T* rstd, bool training, Activation, T* dx, T* dresidual,
                         T* dweight, T* dbias, int threads);

// Over the channels of each row; mean and rstd [rows].
template <typename T>
void layer_norm_forward(int64_t rows, int64_t channels, const T* x, const T* weight, const T* bias, double eps, T* y,
                        T* mean, T* rstd, int threads);
template <typename T>
void layer_norm_backward(int64_t rows, int64_t channels, const T* dy, const T* x, const T* weight, const T* mean,
                         const T* rstd, T* dx, T* dweight, T* dbias, int threads);

// Over the rows of each image and the channels of a group; mean and rstd [images, groups], 0 and 1 without rows.
template <typename T>
void group_norm_forward(const ImageRows&, int64_t channels, int64_t groups, const T* x, const T* weight, const T* bias,
                        double eps, T* y, T* mean, T* rstd, int threads);
template <typename T>
void group_norm_backward(const ImageRows&, int64_t channels, int64_t groups, const T* dy, const T* x, const T* weight,
                         const T* mean, const T* rstd, T* dx, T* dweight, T* dbias, int threads);

// error[p]: mean squared distance of the prediction from the normalised pixels of patch p, whose mean and root of
// (unbiased variance + eps) are mean[p] and root[p].
template <typename T>
void patch_loss_forward(const PatchGrid&, const T* images, const T* prediction, double eps, double* error, T* mean,
                        T* root, int threads);

// grad = scale * (prediction - target) in the patches, with the prediction's strides; elsewhere it is left alone.
template <typename T>
void patch_loss_grad(const PatchGrid&, const T* images, const T* prediction, const T* mean, const T* root, double scale,
                     T* grad, int threads);

}  // namespace SPARK_KERNELS
