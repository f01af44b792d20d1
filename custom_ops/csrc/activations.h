// Activations and their derivatives, one sample at a time, the same on a CPU and on a GPU.
#pragma once

#include <math.h>  // with overloads for float, which <cmath> keeps in std

#include "geometry.h"

namespace custom_ops {

// In the order of _ACTIVATIONS in custom_ops/_native.py.
enum class Activation : int {
  linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish
};

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSoftplusThreshold = 20;  // beyond it PyTorch's softplus is the identity

template <class T>
BOTH_SIDES T sigmoid(T u) {
  return T(1) / (T(1) + exp(-u));
}

template <Activation act, class T>
BOTH_SIDES T activate(T u, T alpha) {
  if constexpr (act == Activation::relu) return u < T(0) ? T(0) : u;
  if constexpr (act == Activation::lrelu) return u > T(0) ? u : u * alpha;
  if constexpr (act == Activation::tanh) return tanh(u);
  if constexpr (act == Activation::sigmoid) return sigmoid(u);
  if constexpr (act == Activation::elu) return u > T(0) ? u : expm1(u);
  if constexpr (act == Activation::selu)
    return T(kSeluScale) * (u > T(0) ? u : T(kSeluAlpha) * expm1(u));
  if constexpr (act == Activation::softplus)
    return u > T(kSoftplusThreshold) ? u : log1p(exp(u));
  if constexpr (act == Activation::swish) return u * sigmoid(u);
  return u;
}

// d act(u) / du. `seen` is act(u), except for swish, where it is u: its value does not tell u.
template <Activation act, class T>
BOTH_SIDES T derivative(T seen, T alpha) {
  if constexpr (act == Activation::relu) return seen > T(0) ? T(1) : T(0);
  if constexpr (act == Activation::lrelu) return seen > T(0) ? T(1) : alpha;
  if constexpr (act == Activation::tanh) return T(1) - seen * seen;
  if constexpr (act == Activation::sigmoid) return seen * (T(1) - seen);
  if constexpr (act == Activation::elu) return seen > T(0) ? T(1) : seen + T(1);
  if constexpr (act == Activation::selu)
    return seen > T(0) ? T(kSeluScale) : seen + T(kSeluScale * kSeluAlpha);
  if constexpr (act == Activation::softplus) return -expm1(-seen);
  if constexpr (act == Activation::swish) {
    const T s = sigmoid(seen);
    return s * (T(1) + seen * (T(1) - s));
  }
  return T(1);
}

// Not-a-number stays what it is: the training loop looks for it.
template <class T>
BOTH_SIDES T clip(T y, T clamp) {
  return y > clamp ? clamp : (y < -clamp ? -clamp : y);
}

// What filtered_lrelu keeps of a sample for its backward pass.
enum Slope : uint8_t { kFlat = 0, kRising = 1, kLeaking = 2 };

template <class T>
struct LeakyRelu {
  T gain, leak, clamp;  // leak: gain * slope

  BOTH_SIDES T value(T u) const { return clip(u * (u > T(0) ? gain : leak), clamp); }

  BOTH_SIDES uint8_t slope(T u) const {
    const T y = u * (u > T(0) ? gain : leak);
    return (y > clamp) | (y < -clamp) ? kFlat : (u > T(0) ? kRising : kLeaking);
  }

  BOTH_SIDES T derivative(uint8_t slope) const {
    return slope == kRising ? gain : (slope == kLeaking ? leak : T(0));
  }
};

// Call f(Activation constant) for an activation known at run time.
#define CUSTOM_OPS_FOR_ACTIVATION(act, ...)                                           \
  switch (act) {                                                                      \
    case Activation::linear: { constexpr auto kAct = Activation::linear; __VA_ARGS__; break; }     \
    case Activation::relu: { constexpr auto kAct = Activation::relu; __VA_ARGS__; break; }         \
    case Activation::lrelu: { constexpr auto kAct = Activation::lrelu; __VA_ARGS__; break; }       \
    case Activation::tanh: { constexpr auto kAct = Activation::tanh; __VA_ARGS__; break; }         \
    case Activation::sigmoid: { constexpr auto kAct = Activation::sigmoid; __VA_ARGS__; break; }   \
    case Activation::elu: { constexpr auto kAct = Activation::elu; __VA_ARGS__; break; }           \
    case Activation::selu: { constexpr auto kAct = Activation::selu; __VA_ARGS__; break; }         \
    case Activation::softplus: { constexpr auto kAct = Activation::softplus; __VA_ARGS__; break; } \
    case Activation::swish: { constexpr auto kAct = Activation::swish; __VA_ARGS__; break; }       \
  }

}  // namespace custom_ops
