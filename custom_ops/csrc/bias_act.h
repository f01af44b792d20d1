// bias_act of one sample, forward and backward, the same on a CPU and on a GPU.
#pragma once

#include "activations.h"

namespace custom_ops {

template <class T>
struct BiasAct {
  T alpha, gain, clamp;

  // u: the sample with its bias.
  template <Activation act>
  BOTH_SIDES T value(T u) const {
    return clip(activate<act>(u, alpha) * gain, clamp);
  }

  // d value(u) / du. seen: value(u), except for swish, where it is u.
  template <Activation act>
  BOTH_SIDES T slope(T seen) const {
    if constexpr (act == Activation::swish) {
      const T y = activate<act>(seen, alpha) * gain;
      return (y > clamp) | (y < -clamp) ? T(0) : gain * derivative<act>(seen, alpha);
    }
    // a clipped value stands at the limit
    return (seen >= clamp) | (seen <= -clamp) ? T(0) : gain * derivative<act>(seen / gain, alpha);
  }
};

}  // namespace custom_ops
