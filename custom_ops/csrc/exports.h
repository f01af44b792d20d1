// The C interface of a library of kernels. `where`: threads of the CPU, or a CUDA stream. A message
// is returned where a kernel could not run, else null.
#pragma once

#include <cstdint>

#include "activations.h"
#include "geometry.h"

using custom_ops::Axis;
using custom_ops::Batch;
using custom_ops::Filter;

// The includer defines custom_ops::Kernels<S, T> with these functions.
// S: as samples are stored. T: as they are computed with.
#define CUSTOM_OPS_EXPORT(S, T, suffix)                                                           \
  extern "C" const char* bias_act_##suffix(                                                       \
      const S* x, const S* seen, const S* bias, S* y, int64_t outer, int64_t channels,            \
      int64_t inner, int64_t activation, double alpha, double gain, double clamp,                 \
      int64_t where) {                                                                            \
    return custom_ops::Kernels<S, T>::bias_act(x, seen, bias, y, outer, channels, inner,          \
                                               activation, alpha, gain, clamp, where);            \
  }                                                                                               \
  extern "C" const char* upfirdn2d_##suffix(const S* x, S* y, const Batch* batch,                 \
                                            const Axis* along, const Filter<T>* filter,           \
                                            int64_t where) {                                      \
    return custom_ops::Kernels<S, T>::upfirdn2d(x, y, batch, along, filter, where);               \
  }                                                                                               \
  extern "C" const char* filtered_lrelu_##suffix(                                                 \
      const S* x, const S* bias, S* y, uint8_t* slopes, int64_t backward, const Batch* batch,     \
      const Axis* along, const Filter<T>* filters, double gain, double slope, double clamp,       \
      int64_t where) {                                                                            \
    return custom_ops::Kernels<S, T>::filtered_lrelu(x, bias, y, slopes, backward, batch, along,  \
                                                     filters, gain, slope, clamp, where);         \
  }

// Only where there are kernels of group_norm. slices: how many parts of an image have partial sums.
#define CUSTOM_OPS_EXPORT_GROUP_NORM(S, T, suffix)                                                \
  extern "C" const char* group_norm_##suffix(                                                     \
      const S* x, S* y, const custom_ops::Grouped* shape, const custom_ops::Affine<T>* affine,    \
      T* partials, T* coefficients, double eps, int64_t silu, int64_t where) {                    \
    return custom_ops::Kernels<S, T>::group_norm(x, y, *shape, *affine, partials, coefficients,   \
                                                 eps, silu, where);                               \
  }                                                                                               \
  extern "C" const char* group_norm_backward_##suffix(                                            \
      const S* x, const S* gradient, S* gradient_x, const custom_ops::Grouped* shape,             \
      const custom_ops::Affine<T>* affine, T* partials, T* coefficients, T* slopes, T* gradients, \
      int64_t silu, int64_t where) {                                                              \
    return custom_ops::Kernels<S, T>::group_norm_backward(x, gradient, gradient_x, *shape,        \
                                                          *affine, partials, coefficients,        \
                                                          slopes, gradients, silu, where);        \
  }
#define CUSTOM_OPS_EXPORT_GROUP_NORM_SLICES                                                       \
  extern "C" int64_t group_norm_slices(const custom_ops::Grouped* shape) {                        \
    return custom_ops::slices_of(*shape).count;                                                   \
  }

// Bytes that filtered_lrelu notes in its forward pass; whether bias_act takes an activation.
#define CUSTOM_OPS_EXPORT_ANSWERS                                                                 \
  extern "C" int64_t slopes_size(const Batch* batch, const Axis* along) {                         \
    return custom_ops::slopes_size(*batch, along);                                                \
  }                                                                                               \
  extern "C" int64_t takes_activation(int64_t activation) {                                       \
    return custom_ops::takes_activation(static_cast<custom_ops::Activation>(activation));         \
  }
