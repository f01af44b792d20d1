// Index arithmetic of resampling, the same on a CPU and on a GPU: which input meets which tap.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BOTH_SIDES __host__ __device__ __forceinline__
#else
#define BOTH_SIDES inline
#endif

#ifdef __CUDA_ARCH__
#define CUSTOM_OPS_UNROLL _Pragma("unroll")
#else
#define CUSTOM_OPS_UNROLL
#endif

namespace custom_ops {

// Division rounded towards minus infinity, for a positive divisor.
template <class Int>
BOTH_SIDES Int floor_divide(Int a, Int b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

template <class Int>
BOTH_SIDES Int ceil_divide(Int a, Int b) {
  return floor_divide<Int>(a + b - 1, b);
}

template <class Int>
BOTH_SIDES Int smaller(Int a, Int b) {
  return a < b ? a : b;
}

template <class Int>
BOTH_SIDES Int larger(Int a, Int b) {
  return a > b ? a : b;
}

// One axis of upfirdn2d: output o is the sum over inputs i in [0, size) of
//   x[i] * taps[i * up + before - o * down]
// wherever that tap exists. The operation's transpose has the same form.
// Field for field the _Axis of custom_ops/_native.py.
struct Axis {
  int64_t size, out, up, down, taps, before;
};

// Images [count, channels, height, width], channels innermost in memory or outermost.
// Field for field the _Batch of custom_ops/_native.py.
struct Batch {
  int64_t count, channels, channels_last;
};

// The filter of one resampling: taps along x and along y, or a plane [y][x] that is no product.
// Field for field the _Filter of custom_ops/_native.py.
template <class T>
struct Filter {
  const T *x, *y, *plane;
};

// First input that meets a tap at output o; may lie outside of the image.
BOTH_SIDES int64_t first_input(const Axis& axis, int64_t o) {
  return ceil_divide<int64_t>(o * axis.down - axis.before, axis.up);
}

// Last input that meets a tap at output o; may lie outside of the image, or before the first.
BOTH_SIDES int64_t last_input(const Axis& axis, int64_t o) {
  return floor_divide<int64_t>(o * axis.down - axis.before + axis.taps - 1, axis.up);
}

BOTH_SIDES int64_t tap_of(const Axis& axis, int64_t i, int64_t o) {
  return i * axis.up + axis.before - o * axis.down;
}

}  // namespace custom_ops
