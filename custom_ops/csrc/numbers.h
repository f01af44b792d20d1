// How samples are stored, and the numbers that are computed with.
#pragma once

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
#endif

}  // namespace custom_ops
