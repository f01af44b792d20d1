// The inner loops on a CPU, in vectors that the compiler splits into what the machine has.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "activations.h"

namespace custom_ops {

constexpr int64_t kVectorBytes = 64;

template <class T>
constexpr int64_t kVectorSize = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <class T>
struct Vectors {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Numbers __attribute__((vector_size(kVectorBytes)));
  typedef T Anywhere __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorSize<T>)));

  static Numbers load(const T* from) { return *reinterpret_cast<const Anywhere*>(from); }
  static void store(T* to, Numbers numbers) { *reinterpret_cast<Anywhere*>(to) = numbers; }
};

// Part of weighted_sum: `count` vectors, each summed in a register of its own.
template <int count, class T>
void sum_vectors(T* dst, int64_t at, const std::vector<const T*>& sources, const T* weights) {
  using V = Vectors<T>;
  typename V::Numbers sums[count] = {};
  const auto terms = sources.size();
  for (size_t k = 0; k < terms; ++k) {
    const T* source = sources[k] + at;
    for (int v = 0; v < count; ++v) sums[v] += weights[k] * V::load(source + v * kVectorSize<T>);
  }
  for (int v = 0; v < count; ++v) V::store(dst + at + v * kVectorSize<T>, sums[v]);
}

// dst[i] = sum over k of weights[k] * sources[k][i], in whole vectors: both may be overrun by one.
template <class T>
void weighted_sum(T* dst, int64_t size, const std::vector<const T*>& sources, const T* weights) {
  constexpr int64_t width = kVectorSize<T>;
  int64_t at = 0;
  for (; at + 8 * width <= size; at += 8 * width) sum_vectors<8>(dst, at, sources, weights);
  switch ((size - at + width - 1) / width) {
    case 8: return sum_vectors<8>(dst, at, sources, weights);
    case 7: return sum_vectors<7>(dst, at, sources, weights);
    case 6: return sum_vectors<6>(dst, at, sources, weights);
    case 5: return sum_vectors<5>(dst, at, sources, weights);
    case 4: return sum_vectors<4>(dst, at, sources, weights);
    case 3: return sum_vectors<3>(dst, at, sources, weights);
    case 2: return sum_vectors<2>(dst, at, sources, weights);
    case 1: return sum_vectors<1>(dst, at, sources, weights);
    default: return;
  }
}

// LeakyRelu::value, and ::slope where slopes is not null, of a vector of samples.
template <class T>
void activate_noting_slopes(const LeakyRelu<T>& lrelu, T* samples, uint8_t* slopes) {
  using V = Vectors<T>;
  using Integer = typename V::Integer;
  const typename V::Numbers u = V::load(samples), zero{}, high = zero + lrelu.clamp;
  const typename V::Integers rising = u > zero;
  const typename V::Numbers y = u * (rising ? zero + lrelu.gain : zero + lrelu.leak);
  const typename V::Integers above = y > high, below = y < -high;
  V::store(samples, above ? high : (below ? -high : y));
  if (!slopes) return;
  // rising is -1 or 0
  const typename V::Integers codes = (rising + Integer{kLeaking}) & ~(above | below);
  const auto bytes = __builtin_convertvector(codes, typename V::Bytes);
  std::memcpy(slopes, &bytes, sizeof bytes);
}

// A vector of bytes as integers.
template <class Integers>
void widen(const uint8_t* bytes, Integers& integers) {
#ifdef __AVX512F__  // one instruction, which GCC does not find
  if constexpr (sizeof(integers[0]) == 4) {
    const auto narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const auto wide = _mm512_maskz_cvtepu8_epi32(0xffff, narrow);
    std::memcpy(&integers, &wide, sizeof wide);
    return;
  }
#endif
  for (size_t i = 0; i < sizeof integers / sizeof integers[0]; ++i) integers[i] = bytes[i];
}

// Multiply a vector of samples by LeakyRelu::derivative of their slopes.
template <class T>
void multiply_by_slopes(const LeakyRelu<T>& lrelu, T* samples, const uint8_t* slopes) {
  using V = Vectors<T>;
  using Integer = typename V::Integer;
  typename V::Integers codes;
  widen(slopes, codes);
  const typename V::Numbers zero{};
  const typename V::Numbers leaking = codes == Integer{kLeaking} ? zero + lrelu.leak : zero;
  V::store(samples, V::load(samples) * (codes == Integer{kRising} ? zero + lrelu.gain : leaking));
}

}  // namespace custom_ops
