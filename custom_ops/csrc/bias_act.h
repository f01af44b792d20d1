// bias_act of one sample, forward and backward, the same on a CPU and on a GPU.
#pragma once

#include "activations.h"
#include "numbers.h"

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

// Samples that are read, computed and written together.
template <class S, int kSize>
struct alignas(sizeof(S) * kSize) Pack {
  S at[kSize];
};

// What each GPU thread does: y = value(x + bias), or y = x * slope(seen + bias) where x is a
// gradient. All are [outer, channels, inner] in memory; a pack lies within one channel, or is of
// neighbouring channels (inner 1). emulated.cpp runs it on a CPU.
template <class S, class T, class Int, int kSize>
struct BiasActPacks {
  using Samples = Pack<S, kSize>;

  const S *x, *seen, *bias;
  S* y;
  Int packs, channels, inner;
  Activation activation;
  BiasAct<T> math;

  BOTH_SIDES void run(Int thread, Int threads) const {
    for (Int pack = thread; pack < packs; pack += threads) {
      const Samples in = reinterpret_cast<const Samples*>(x)[pack];
      const Samples known = seen ? reinterpret_cast<const Samples*>(seen)[pack] : in;
      const Int channel = pack * kSize / inner % channels;
      Samples out;
CUSTOM_OPS_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const T b = bias ? to_number(bias[channel + (inner == 1 ? i : 0)]) : T(0);
        const T u = to_number(known.at[i]) + b;
        T result = 0;
        CUSTOM_OPS_FOR_ACTIVATION(activation, result = seen ? math.template slope<kAct>(u)
                                                            : math.template value<kAct>(u));
        out.at[i] = from_number<S>(seen ? to_number(in.at[i]) * result : result);
      }
      reinterpret_cast<Samples*>(y)[pack] = out;
    }
  }
};

}  // namespace custom_ops
