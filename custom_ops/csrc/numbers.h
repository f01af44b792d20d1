// How samples are stored, and the numbers that are computed with.
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace custom_ops {

BOTH_SIDES float to_number(float x) { return x; }
BOTH_SIDES double to_number(double x) { return x; }

template <class S>
BOTH_SIDES S from_number(float x) {
  return x;
}
template <class S>
BOTH_SIDES S from_number(double x) {
  return x;
}

#ifdef __CUDACC__
BOTH_SIDES float to_number(__half x) { return __half2float(x); }
BOTH_SIDES float to_number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <>
BOTH_SIDES __half from_number<__half>(float x) {
  return __float2half_rn(x);
}
template <>
BOTH_SIDES __nv_bfloat16 from_number<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
#else  // for the emulation of kernels

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float to_number(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

template <>
inline BFloat16 from_number<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounding = 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + rounding) >> 16)};
}

#ifdef __FLT16_MAX__  // a compiler that has half precision
inline float to_number(_Float16 x) { return static_cast<float>(x); }

template <>
inline _Float16 from_number<_Float16>(float x) {
  return static_cast<_Float16>(x);
}
#endif
#endif

}  // namespace custom_ops
