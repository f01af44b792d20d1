// The GPU kernels on a CPU, one thread after the other: slow, and only for the tests.

#include <cstdint>
#include <vector>

#include "exports.h"
#include "launches.h"

namespace custom_ops {
namespace {

constexpr int kThreads = 64;

template <int phase, class Op, class T>
void run_phases(const Op& op, int64_t block, std::vector<T>& shared) {
  for (int thread = 0; thread < kThreads; ++thread)
    op.template run<phase>(block, thread, kThreads, shared.data());
  if constexpr (phase + 1 < Op::kPhases) run_phases<phase + 1>(op, block, shared);
}

template <class T>
struct EmulateTiles {
  static constexpr int kBlockThreads = kThreads;

  template <class Op>
  const char* operator()(const Op& op) const {
    std::vector<T> shared(static_cast<size_t>(op.shared_size()));
    for (int64_t block = 0; block < op.grid.blocks(); ++block) run_phases<0>(op, block, shared);
    return nullptr;
  }
};

struct EmulatePacks {
  template <class Op>
  const char* operator()(const Op& op) const {
    for (int thread = 0; thread < kThreads; ++thread) op.run(thread, kThreads);
    return nullptr;
  }
};

}  // namespace

template <class S, class T>
struct Kernels {
  static const char* bias_act(const S* x, const S* seen, const S* bias, S* y, int64_t outer,
                              int64_t channels, int64_t inner, int64_t activation, double alpha,
                              double gain, double clamp, int64_t) {
    const BiasAct<T> math{T(alpha), T(gain), T(clamp)};
    return launch_bias_act<S, T>(x, seen, bias, y, outer, channels, inner, activation,
                                 math, EmulatePacks());
  }

  static const char* upfirdn2d(const S* x, S* y, const Batch* batch, const Axis* along,
                               const Filter<T>* filter, int64_t) {
    return launch_upfirdn2d<S, T>(x, y, *batch, along, *filter, EmulateTiles<T>());
  }

  static const char* filtered_lrelu(const S* x, const S* bias, S* y, uint8_t* slopes,
                                    int64_t backward, const Batch* batch, const Axis* along,
                                    const Filter<T>* filters, double gain, double slope,
                                    double clamp, int64_t) {
    const LeakyRelu<T> lrelu{T(gain), T(gain * slope), T(clamp)};
    const FilteredLreluArguments<S, T> arguments{x, bias, y, slopes, backward != 0, lrelu, *batch,
                                                 along, filters};
    return launch_filtered_lrelu(arguments, EmulateTiles<T>());
  }

  static const char* group_norm(const S* x, S* y, const Grouped& shape, const Affine<T>& affine,
                                T* partials, T* coefficients, double eps, int64_t silu,
                                int64_t) {
    const NormCoefficients<T> numbers{coefficients, shape.count * shape.channels};
    const GroupNormArguments<S, T> arguments{x, shape, affine, partials, numbers, silu != 0};
    return launch_group_norm(arguments, y, T(eps), EmulateTiles<T>());
  }

  static const char* group_norm_backward(const S* x, const S* gradient, S* gradient_x,
                                         const Grouped& shape, const Affine<T>& affine,
                                         T* partials, T* coefficients, T* slopes, T* gradients,
                                         int64_t silu, int64_t) {
    const NormCoefficients<T> numbers{coefficients, shape.count * shape.channels};
    const GroupNormArguments<S, T> arguments{x, shape, affine, partials, numbers, silu != 0};
    return launch_group_norm_backward(arguments, gradient, gradient_x, slopes, gradients,
                                      EmulateTiles<T>());
  }
};

}  // namespace custom_ops

CUSTOM_OPS_EXPORT_ANSWERS
CUSTOM_OPS_EXPORT_GROUP_NORM_SLICES
CUSTOM_OPS_EXPORT(float, float, f32)
CUSTOM_OPS_EXPORT(double, double, f64)
CUSTOM_OPS_EXPORT_GROUP_NORM(float, float, f32)
CUSTOM_OPS_EXPORT_GROUP_NORM(double, double, f64)
CUSTOM_OPS_EXPORT_GROUP_NORM(custom_ops::BFloat16, float, bf16)
#ifdef __FLT16_MAX__
CUSTOM_OPS_EXPORT_GROUP_NORM(_Float16, float, f16)
#endif
