// Which variant of a GPU kernel runs for which arguments, and how large its tiles are. Whoever
// includes this says how a variant is launched: on a GPU (cuda.cu) or emulated (emulated.cpp).
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "bias_act.h"
#include "group_norm.h"
#include "tiles.h"

namespace custom_ops {

constexpr int64_t kSharedBytes = 64 << 10;  // what every GPU since Volta can grant a block
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();

constexpr const char* kTooLong = "the filter is too long for the shared memory of a GPU";
using AnyLine = Line<1, 1, 0>;

template <int up, int down, int taps>
bool is_line(const Axis& x, const Axis& y) {
  return x.up == up && x.down == down && x.taps == taps && y.up == up && y.down == down &&
         y.taps == taps;
}

// Launch make(width, height) with the largest tile that fits into shared memory.
template <class T, class Make, class Launch>
const char* launch_largest(int side, const Make& make, const Launch& launch) {
  for (int height = side, width = side; height >= kRun; (width > height ? width : height) /= 2) {
    const auto op = make(width, height);
    if (op.shared_size() * static_cast<int64_t>(sizeof(T)) > kSharedBytes) continue;
    return op.grid.blocks() > kMostBlocks ? "too many tiles for one launch" : launch(op);
  }
  return kTooLong;
}

// Launch with four channels to a block where neighbours in memory are channels, if that fits.
template <class Launch>
const char* launch_of_lanes(const Batch& batch, const Launch& launch) {
  const char* message = batch.channels_last ? launch(std::integral_constant<int, 4>()) : kTooLong;
  return message == kTooLong ? launch(std::integral_constant<int, 1>()) : message;
}

template <class S, class T, class Line, int kLanes, class Launch>
const char* upfirdn2d_of_line(const S* x, S* y, const Batch& batch, const Axis* along,
                             const Filter<T>& filter, const Launch& launch) {
  const auto make = [&](int width, int height) {
    return Upfirdn2dTile<S, T, Line, Line, kLanes>(x, y, batch, along, filter, width, height);
  };
  return launch_largest<T>(kLanes == 1 ? 32 : 16, make, launch);
}

template <class S, class T, int kLanes, class Launch>
const char* upfirdn2d_of_lanes(const S* x, S* y, const Batch& batch, const Axis* along,
                               const Filter<T>& filter, const Launch& launch) {
  const auto with = [&](auto line) {
    return upfirdn2d_of_line<S, T, decltype(line), kLanes>(x, y, batch, along, filter, launch);
  };
  if constexpr (sizeof(T) <= 4) {
    if (is_line<1, 1, 4>(along[0], along[1])) return with(Line<1, 1, 4>());
    if (is_line<2, 1, 4>(along[0], along[1])) return with(Line<2, 1, 4>());
    if (is_line<1, 2, 4>(along[0], along[1])) return with(Line<1, 2, 4>());
  }
  return with(AnyLine());
}

template <class S, class T, class Launch>
const char* launch_upfirdn2d(const S* x, S* y, const Batch& batch, const Axis* along,
                      const Filter<T>& filter, const Launch& launch) {
  return launch_of_lanes(batch, [&](auto lanes) {
    return upfirdn2d_of_lanes<S, T, decltype(lanes)::value>(x, y, batch, along, filter, launch);
  });
}

inline bool takes_activation(Activation) { return true; }

// Two bits for each sample of the upsampled images, four rows to a byte.
inline int64_t slopes_size(const Batch& batch, const Axis* along) {
  return batch.count * batch.channels * ceil_divide<int64_t>(along[1].out, kRun) * along[0].out;
}

template <class S, class T>
struct FilteredLreluArguments {
  const S *x, *bias;
  S* y;
  uint8_t* slopes;
  bool backward;
  LeakyRelu<T> lrelu;
  Batch batch;
  const Axis* along;
  const Filter<T>* filters;
};

template <class LineUp, class LineDown, int kLanes, class S, class T, class Launch>
const char* filtered_lrelu_of_lines(const FilteredLreluArguments<S, T>& a, const Launch& launch) {
  const auto make = [&](int width, int height) {
    return FilteredLreluTile<S, T, LineUp, LineDown, kLanes>(
        a.x, a.bias, a.y, a.slopes, a.backward, a.lrelu, a.batch, a.along, a.filters, width,
        height);
  };
  return launch_largest<T>(kLanes == 1 ? 32 : 16, make, launch);
}

template <int kLanes, class S, class T, class Launch>
const char* filtered_lrelu_of_lanes(const FilteredLreluArguments<S, T>& a, const Launch& launch) {
  if constexpr (sizeof(T) <= 4) {
    using Up2 = Line<2, 1, 12>;
    using Up4 = Line<4, 1, 24>;
    using Down2 = Line<1, 2, 12>;
    using Down4 = Line<1, 4, 24>;
    const bool up_2 = is_line<2, 1, 12>(a.along[0], a.along[1]);
    const bool up_4 = is_line<4, 1, 24>(a.along[0], a.along[1]);
    const bool down_2 = is_line<1, 2, 12>(a.along[2], a.along[3]);
    const bool down_4 = is_line<1, 4, 24>(a.along[2], a.along[3]);
    if (up_2 && down_2) return filtered_lrelu_of_lines<Up2, Down2, kLanes>(a, launch);
    if (up_4 && down_2) return filtered_lrelu_of_lines<Up4, Down2, kLanes>(a, launch);
    if (up_2 && down_4) return filtered_lrelu_of_lines<Up2, Down4, kLanes>(a, launch);
  }
  return filtered_lrelu_of_lines<AnyLine, AnyLine, kLanes>(a, launch);
}

template <class S, class T, class Launch>
const char* launch_filtered_lrelu(const FilteredLreluArguments<S, T>& a, const Launch& launch) {
  return launch_of_lanes(a.batch, [&](auto lanes) {
    return filtered_lrelu_of_lanes<decltype(lanes)::value>(a, launch);
  });
}

// Launch with packs of 16 bytes where the shape and the addresses allow it.
template <class S, class T, class Launch>
const char* launch_bias_act(const S* x, const S* seen, const S* bias, S* y, int64_t outer,
                     int64_t channels, int64_t inner, int64_t activation, const BiasAct<T>& math,
                     const Launch& launch) {
  constexpr int size = 16 / sizeof(S);
  const int64_t samples = outer * channels * inner;
  const auto address = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(seen) |
                       reinterpret_cast<uintptr_t>(y);
  const bool is_packed = address % 16 == 0 && (inner == 1 ? channels : inner) % size == 0;
  const auto with = [&](auto index, auto pack) {
    using Int = decltype(index);
    constexpr int kSize = decltype(pack)::value;
    const Int packs = static_cast<Int>(samples / kSize);
    return launch(BiasActPacks<S, T, Int, kSize>{x, seen, bias, y, packs,
                                                 static_cast<Int>(channels),
                                                 static_cast<Int>(inner),
                                                 static_cast<Activation>(activation), math});
  };
  using Wide = std::integral_constant<int, size>;
  using Single = std::integral_constant<int, 1>;
  if (samples < (int64_t{1} << 30))  // and no sum of an index and a stride overflows
    return is_packed ? with(int32_t{}, Wide{}) : with(int32_t{}, Single{});
  return is_packed ? with(int64_t{}, Wide{}) : with(int64_t{}, Single{});
}

template <class S, class T>
struct GroupNormArguments {
  const S* x;
  Grouped shape;
  Affine<T> affine;
  T* partials;
  NormCoefficients<T> coefficients;
  bool silu;
};

inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Call f with the grid of threads for images [count, channels, pixels], of packs of 16 bytes where
// the shape and the addresses allow it.
template <class S, class F>
const char* with_norm_grid(const Grouped& shape, bool is_packed, int threads, const F& f) {
  constexpr int size = 16 / sizeof(S);
  const auto with = [&](auto grid) {
    return grid.blocks() > kMostBlocks ? "too many samples for one launch" : f(grid);
  };
  is_packed = is_packed && (shape.channels_last ? shape.channels : shape.pixels) % size == 0;
  if (shape.channels_last)
    return is_packed ? with(NormGrid<size, true>(shape, threads))
                     : with(NormGrid<1, true>(shape, threads));
  return is_packed ? with(NormGrid<size, false>(shape, threads))
                   : with(NormGrid<1, false>(shape, threads));
}

template <class S, class T, class Launch>
const char* launch_group_norm(const GroupNormArguments<S, T>& a, S* y, T eps,
                              const Launch& launch) {
  const bool is_packed = is_aligned(a.x) && is_aligned(y);
  return with_norm_grid<S>(a.shape, is_packed, Launch::kBlockThreads, [&](auto grid) {
    using Grid = decltype(grid);
    const char* message = launch(NormMoments<S, T, Grid>{a.x, a.partials, grid});
    if (!message)
      message = launch(NormForwardSums<T>{a.shape, grid.slices, a.affine, a.partials,
                                          a.coefficients, eps, ImageGrid{a.shape.count}});
    if (message) return message;
    return launch(NormResults<S, T, Grid>{a.x, y, a.coefficients, a.silu, grid});
  });
}

template <class S, class T, class Launch>
const char* launch_group_norm_backward(const GroupNormArguments<S, T>& a, const S* gradient,
                                       S* gradient_x, T* slopes, T* gradients,
                                       const Launch& launch) {
  const bool is_packed = is_aligned(a.x) && is_aligned(gradient) && is_aligned(gradient_x);
  return with_norm_grid<S>(a.shape, is_packed, Launch::kBlockThreads, [&](auto grid) {
    using Grid = decltype(grid);
    const char* message = launch(NormGradientSums<S, T, Grid>{a.x, gradient, a.coefficients,
                                                              a.partials, a.silu, grid});
    if (!message)
      message = launch(NormBackwardSums<T>{a.shape, grid.slices, a.affine, a.partials,
                                           a.coefficients, slopes, gradients,
                                           ImageGrid{a.shape.count}});
    if (message) return message;
    return launch(NormGradient<S, T, Grid>{a.x, gradient, gradient_x, a.coefficients, slopes,
                                           a.silu, grid});
  });
}

}  // namespace custom_ops
