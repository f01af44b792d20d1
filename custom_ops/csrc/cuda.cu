// The custom operations on a CUDA GPU, for float, double, half and bfloat16, contiguous or
// channels-last. The C interface of cpu.cpp, and group_norm beyond it; the bodies are in tiles.h,
// bias_act.h and group_norm.h.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "exports.h"
#include "launches.h"

namespace custom_ops {
namespace {

constexpr int kThreads = 256;
constexpr size_t kUnaskedBytes = 48 << 10;  // of shared memory; more must be asked for

template <int phase, class Op, class T>
__device__ __forceinline__ void run_phases(const Op& op, T* shared) {
  op.template run<phase>(blockIdx.x, threadIdx.x, kThreads, shared);
  if constexpr (phase + 1 < Op::kPhases) {
    __syncthreads();
    run_phases<phase + 1>(op, shared);
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads) tile_kernel(const __grid_constant__ Op op) {
  extern __shared__ double shared[];  // aligned for every T
  run_phases<0>(op, reinterpret_cast<T*>(shared));
}

template <class Op, class Int>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Op op, Int threads) {
  op.run(static_cast<Int>(blockIdx.x) * kThreads + threadIdx.x, threads);
}

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
struct LaunchTiles {
  static constexpr int kBlockThreads = kThreads;
  cudaStream_t stream;

  template <class Op>
  const char* operator()(const Op& op) const {
    const auto blocks = static_cast<unsigned>(op.grid.blocks());
    const auto bytes = static_cast<size_t>(op.shared_size()) * sizeof(T);
    if (bytes > kUnaskedBytes) {
      const auto error = cudaFuncSetAttribute(
          tile_kernel<Op, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      if (error != cudaSuccess) return message(error);
    }
    tile_kernel<Op, T><<<blocks, kThreads, bytes, stream>>>(op);
    return message(cudaGetLastError());
  }
};

struct LaunchPacks {
  cudaStream_t stream;

  template <class S, class T, class Int, int kSize>
  const char* operator()(const BiasActPacks<S, T, Int, kSize>& op) const {
    using Op = BiasActPacks<S, T, Int, kSize>;
    constexpr int64_t kEnoughBlocks = 1 << 14;
    const int64_t wanted = (static_cast<int64_t>(op.packs) + kThreads - 1) / kThreads;
    const int64_t blocks = std::min(wanted, kEnoughBlocks);
    const Int threads = static_cast<Int>(blocks * kThreads);
    pack_kernel<Op, Int><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(op, threads);
    return message(cudaGetLastError());
  }
};

cudaStream_t stream_of(int64_t where) { return reinterpret_cast<cudaStream_t>(where); }

}  // namespace

template <class S, class T>
struct Kernels {
  static const char* bias_act(const S* x, const S* seen, const S* bias, S* y, int64_t outer,
                              int64_t channels, int64_t inner, int64_t activation, double alpha,
                              double gain, double clamp, int64_t where) {
    const BiasAct<T> math{T(alpha), T(gain), T(clamp)};
    return launch_bias_act<S, T>(x, seen, bias, y, outer, channels, inner, activation, math,
                                 LaunchPacks{stream_of(where)});
  }

  static const char* upfirdn2d(const S* x, S* y, const Batch* batch, const Axis* along,
                               const Filter<T>* filter, int64_t where) {
    return launch_upfirdn2d<S, T>(x, y, *batch, along, *filter, LaunchTiles<T>{stream_of(where)});
  }

  static const char* filtered_lrelu(const S* x, const S* bias, S* y, uint8_t* slopes,
                                    int64_t backward, const Batch* batch, const Axis* along,
                                    const Filter<T>* filters, double gain, double slope,
                                    double clamp, int64_t where) {
    const LeakyRelu<T> lrelu{T(gain), T(gain * slope), T(clamp)};
    const FilteredLreluArguments<S, T> arguments{x, bias, y, slopes, backward != 0, lrelu, *batch,
                                                 along, filters};
    return launch_filtered_lrelu(arguments, LaunchTiles<T>{stream_of(where)});
  }

  static const char* group_norm(const S* x, S* y, const Grouped& shape, const Affine<T>& affine,
                                T* partials, T* coefficients, double eps, int64_t silu,
                                int64_t where) {
    const NormCoefficients<T> numbers{coefficients, shape.count * shape.channels};
    const GroupNormArguments<S, T> arguments{x, shape, affine, partials, numbers, silu != 0};
    return launch_group_norm(arguments, y, T(eps), LaunchTiles<T>{stream_of(where)});
  }

  static const char* group_norm_backward(const S* x, const S* gradient, S* gradient_x,
                                         const Grouped& shape, const Affine<T>& affine,
                                         T* partials, T* coefficients, T* slopes, T* gradients,
                                         int64_t silu, int64_t where) {
    const NormCoefficients<T> numbers{coefficients, shape.count * shape.channels};
    const GroupNormArguments<S, T> arguments{x, shape, affine, partials, numbers, silu != 0};
    return launch_group_norm_backward(arguments, gradient, gradient_x, slopes, gradients,
                                      LaunchTiles<T>{stream_of(where)});
  }
};

}  // namespace custom_ops

CUSTOM_OPS_EXPORT_ANSWERS
CUSTOM_OPS_EXPORT_GROUP_NORM_SLICES
CUSTOM_OPS_EXPORT(float, float, f32)
CUSTOM_OPS_EXPORT(double, double, f64)
CUSTOM_OPS_EXPORT(__half, float, f16)
CUSTOM_OPS_EXPORT(__nv_bfloat16, float, bf16)
CUSTOM_OPS_EXPORT_GROUP_NORM(float, float, f32)
CUSTOM_OPS_EXPORT_GROUP_NORM(double, double, f64)
CUSTOM_OPS_EXPORT_GROUP_NORM(__half, float, f16)
CUSTOM_OPS_EXPORT_GROUP_NORM(__nv_bfloat16, float, bf16)
