// Group normalisation on a GPU: the blocks of threads that read and write the images, and the
// blocks that combine sums. The definition is in custom_ops/group_norm.py.
//
// Forward: one pass over x for the moments, one for the results. Backward: one pass over x and the
// gradient of y for two sums of each image and channel, one for the gradient of x. Between two
// passes a block for each image turns sums into one linear function for each channel. All sums are
// in a fixed order, so results are the same in every run.
//
// As in tiles.h, no phase uses anything that only a GPU has, so that emulated.cpp runs all of this
// on a CPU.
#pragma once

#include <cstdint>

#include "activations.h"
#include "bias_act.h"
#include "geometry.h"
#include "numbers.h"

namespace custom_ops {

// Images [count, channels, pixels] in groups of channels, channels innermost in memory or not.
// Field for field the _Grouped of custom_ops/_native.py.
struct Grouped {
  int64_t count, channels, pixels, groups, channels_last;
};

// The factors and terms of a normalisation, null where there are none: weight and bias [channels];
// scale, shift and pre_bias [count, channels], each with the step from one image to the next.
// Field for field the _Affine of custom_ops/_native.py.
template <class T>
struct Affine {
  const T *weight, *bias, *scale, *shift, *pre_bias;
  int64_t scale_step, shift_step, pre_bias_step;

  BOTH_SIDES T weight_at(int64_t channel) const { return weight ? weight[channel] : T(1); }
  BOTH_SIDES T bias_at(int64_t channel) const { return bias ? bias[channel] : T(0); }
  BOTH_SIDES T scale_at(int64_t image, int64_t channel) const {
    return T(1) + (scale ? scale[image * scale_step + channel] : T(0));
  }
  BOTH_SIDES T shift_at(int64_t image, int64_t channel) const {
    return shift ? shift[image * shift_step + channel] : T(0);
  }
  BOTH_SIDES T pre_bias_at(int64_t image, int64_t channel) const {
    return pre_bias ? pre_bias[image * pre_bias_step + channel] : T(0);
  }
};

// The parts of an image that different blocks read: `count` slices of so many pixels, the last one
// may be shorter.
struct Slices {
  int64_t pixels, count;

  BOTH_SIDES int64_t size(int64_t slice, int64_t of) const {
    return smaller(pixels, of - slice * pixels);
  }
};

inline Slices slices_of(const Grouped& x) {
  constexpr int64_t kManyBlocks = 1024;
  constexpr int64_t kMultiple = 16;  // so that slices begin with a whole pack
  const int64_t block_channels = x.channels_last ? 256 : 8;
  const int64_t least_pixels = x.channels_last ? 64 : 256;
  const int64_t blocks = x.count * ceil_divide(x.channels, block_channels);
  const int64_t most = larger<int64_t>(1, x.pixels / least_pixels);
  const int64_t count = smaller(most, ceil_divide(kManyBlocks, blocks));
  const int64_t pixels =
      ceil_divide(ceil_divide(x.pixels, count), kMultiple) * kMultiple;
  return {pixels, ceil_divide(x.pixels, pixels)};
}

// The packs of samples that one thread works on, in the order of memory.
struct Run {
  int64_t begin, step, image;  // begin, step: in samples
  int channel, count;          // first channel; number of packs
};

// Which thread of which block works on which packs. A thread keeps to its channels: kSize of them
// in channels-last images, else one. Threads with the same channels are the rows of a column.
template <int kSize_, bool kLast_>
struct NormGrid {
  static constexpr int kSize = kSize_;
  static constexpr bool kLast = kLast_;
  static constexpr int kChannels = kLast ? kSize : 1;  // of a thread
  static constexpr int kPixels = kLast ? 1 : kSize;    // of a pack

  int64_t channels, pixels, count;
  Slices slices;
  int ranges, columns, rows;

  NormGrid(const Grouped& x, int threads)
      : channels(x.channels), pixels(x.pixels), count(x.count), slices(slices_of(x)) {
    constexpr int64_t kMost = 32;  // packs in a row: 512 bytes
    const int64_t packs = smaller(slices.pixels, pixels) / kPixels;
    int64_t wide = 0, high = 0, parts = 0;
    if (kLast) {
      const int64_t across = channels / kSize;
      parts = ceil_divide(across, kMost);
      wide = ceil_divide(across, parts);
      high = smaller<int64_t>(threads / wide, packs);
    } else {
      high = smaller(kMost, packs);
      wide = smaller<int64_t>(threads / high, channels);
      parts = ceil_divide(channels, wide);
    }
    ranges = static_cast<int>(parts);
    columns = static_cast<int>(wide);
    rows = static_cast<int>(high);
  }

  int64_t blocks() const { return count * slices.count * ranges; }

  // The block in the opposite order: what one pass read last, and a cache may still hold, the next
  // pass reads first.
  BOTH_SIDES int64_t reversed(int64_t block) const {
    return count * slices.count * ranges - 1 - block;
  }

  // Divisions of 32 bits: those of 64 take a GPU longer than all else that a thread begins with.
  BOTH_SIDES uint32_t range(int64_t block) const { return small(block) % small(ranges); }
  BOTH_SIDES uint32_t slice(int64_t block) const {
    return small(block) / small(ranges) % small(slices.count);
  }
  BOTH_SIDES int64_t image(int64_t block) const {
    return small(block) / small(ranges) / small(slices.count);
  }
  static BOTH_SIDES uint32_t small(int64_t number) { return static_cast<uint32_t>(number); }

  // Packs of each column in a block, and of one of its rows.
  BOTH_SIDES int packs(int64_t block) const {
    return static_cast<int>(slices.size(slice(block), pixels)) / kPixels;
  }
  BOTH_SIDES int packs_of(int row, int all) const { return all / rows + (row < all % rows); }

  BOTH_SIDES int row(int thread) const { return kLast ? thread / columns : thread % rows; }
  BOTH_SIDES int column(int thread) const { return kLast ? thread % columns : thread / rows; }

  BOTH_SIDES Run run(int64_t block, int thread) const {
    const int row_ = row(thread), column_ = column(thread);
    const int64_t channel = (int64_t{range(block)} * columns + column_) * kChannels;
    const bool is_idle = row_ >= rows || column_ >= columns || channel >= channels;
    const int64_t pixel = slice(block) * slices.pixels + row_ * kPixels;
    Run run;
    run.image = image(block);
    run.channel = static_cast<int>(channel);
    run.count = is_idle ? 0 : packs_of(row_, packs(block));
    run.begin = kLast ? (run.image * pixels + pixel) * channels + channel
                      : (run.image * channels + channel) * pixels + pixel;
    run.step = kLast ? rows * channels : rows * kSize;
    return run;
  }

  // Shared memory: a number for each channel of each thread. The pitch keeps threads that write or
  // read together on different banks.
  BOTH_SIDES int pitch() const { return rows * columns + 4; }
  BOTH_SIDES int size() const { return kChannels * pitch(); }
  BOTH_SIDES int at(int channel, int row, int column) const {
    return channel * pitch() + row * columns + column;
  }
};

// Read up to kBatch packs of a run, from pack `first` on, before any is used.
template <int kBatch, class S, int kSize>
BOTH_SIDES void read_packs(const S* from, const Run& run, int first, Pack<S, kSize>* packs) {
CUSTOM_OPS_UNROLL
  for (int j = 0; j < kBatch; ++j)
    if (first + j < run.count)
      packs[j] = *reinterpret_cast<const Pack<S, kSize>*>(from + run.begin +
                                                          (first + j) * run.step);
}

// The mean of some samples, and the sum of their squared deviations from it.
template <class T>
struct Moments {
  T mean, deviations;
};

// Moments of all samples of several parts. part(i): moments; count(i): samples, of the first part
// at least one. Sums are of differences from a mean, so that a large mean costs no digits.
template <class T, class Part, class Count>
BOTH_SIDES Moments<T> merged(int parts, T samples, const Part& part, const Count& count) {
  const T origin = part(0).mean;
  T distance = 0, deviations = 0;
  for (int i = 0; i < parts; ++i) distance += count(i) * (part(i).mean - origin);
  const T mean = origin + distance / samples;
  for (int i = 0; i < parts; ++i) {
    const Moments<T> one = part(i);
    const T far = one.mean - mean;
    deviations += one.deviations + count(i) * far * far;
  }
  return {mean, deviations};
}

// 1 / (1 + e^-u); to about 1e-6 where samples are stored in 16 bits.
template <class S, class T>
BOTH_SIDES T sigmoid_for(T u) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) == 2) return __fdividef(1.0f, 1.0f + __expf(-u));
#endif
  return sigmoid(u);
}

// d silu(u) / du
template <class S, class T>
BOTH_SIDES T silu_slope(T u) {
  const T s = sigmoid_for<S>(u);
  return s * (T(1) + u * (T(1) - s));
}

// First pass forward: the moments of each channel in each slice.
// partials: means [count, slices, channels], then squared deviations.
template <class S, class T, class Grid>
struct NormMoments {
  static constexpr int kPhases = 2;
  static constexpr int kBatch = 4;
  using Samples = Pack<S, Grid::kSize>;

  const S* x;
  T* partials;
  Grid grid;

  int shared_size() const { return 2 * grid.size(); }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int threads, T* shared) const {
    if constexpr (phase == 0) read(grid.run(block, thread), thread, shared);
    if constexpr (phase == 1) merge(block, thread, threads, shared);
  }

  BOTH_SIDES void read(const Run& run, int thread, T* shared) const {
    if (run.count == 0) return;
    T origin[Grid::kChannels], sum[Grid::kChannels], squares[Grid::kChannels];
    const Samples first = *reinterpret_cast<const Samples*>(x + run.begin);
CUSTOM_OPS_UNROLL
    for (int c = 0; c < Grid::kChannels; ++c) {
      origin[c] = to_number(first.at[c]);
      sum[c] = squares[c] = T(0);
    }
    for (int i = 0; i < run.count; i += kBatch) {
      Samples packs[kBatch];
      read_packs<kBatch>(x, run, i, packs);
CUSTOM_OPS_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= run.count) break;
CUSTOM_OPS_UNROLL
        for (int k = 0; k < Grid::kSize; ++k) {
          const int c = Grid::kLast ? k : 0;
          const T far = to_number(packs[j].at[k]) - origin[c];
          sum[c] += far;
          squares[c] += far * far;
        }
      }
    }
    const T share = T(1) / static_cast<T>(run.count * Grid::kPixels);
    const int row = grid.row(thread), column = grid.column(thread);
CUSTOM_OPS_UNROLL
    for (int c = 0; c < Grid::kChannels; ++c) {
      const T mean = sum[c] * share;
      shared[grid.at(c, row, column)] = origin[c] + mean;
      shared[grid.size() + grid.at(c, row, column)] = larger(T(0), squares[c] - mean * sum[c]);
    }
  }

  BOTH_SIDES void merge(int64_t block, int thread, int threads, const T* shared) const {
    const int packs = grid.packs(block), filled = smaller(grid.rows, packs);
    const int64_t slot = grid.image(block) * grid.slices.count + grid.slice(block);
    const int64_t plane = grid.count * grid.slices.count * grid.channels;
    for (int i = thread; i < grid.columns * Grid::kChannels; i += threads) {
      const int c = i % Grid::kChannels, column = i / Grid::kChannels;
      const int64_t channel = int64_t{grid.range(block)} * grid.columns * Grid::kChannels + i;
      if (channel >= grid.channels) break;
      const auto part = [&](int row) {
        const T* mean = shared + grid.at(c, row, column);
        return Moments<T>{mean[0], mean[grid.size()]};
      };
      const auto count = [&](int row) {
        return static_cast<T>(grid.packs_of(row, packs) * Grid::kPixels);
      };
      const auto all = merged(filled, static_cast<T>(packs * Grid::kPixels), part, count);
      partials[slot * grid.channels + channel] = all.mean;
      partials[plane + slot * grid.channels + channel] = all.deviations;
    }
  }
};

// Blocks of the same threads, one for each image.
struct ImageGrid {
  int64_t count;

  int64_t blocks() const { return count; }
};

// With n = r x + o the normalised sample: y = act(a x + b), and total = the sum of n over pixels.
template <class T>
struct NormCoefficients {
  T* all;  // [5, count, channels]
  int64_t plane;

  BOTH_SIDES T* a() const { return all; }
  BOTH_SIDES T* b() const { return all + plane; }
  BOTH_SIDES T* r() const { return all + 2 * plane; }
  BOTH_SIDES T* o() const { return all + 3 * plane; }
  BOTH_SIDES T* total() const { return all + 4 * plane; }
};

// Between the passes forward: moments of channels -> of groups -> coefficients.
template <class T>
struct NormForwardSums {
  static constexpr int kPhases = 3;

  Grouped x;
  Slices slices;
  Affine<T> affine;
  const T* partials;
  NormCoefficients<T> coefficients;
  T eps;
  ImageGrid grid;

  int shared_size() const { return static_cast<int>(2 * (x.channels + x.groups)); }

  template <int phase>
  BOTH_SIDES void run(int64_t image, int thread, int threads, T* shared) const {
    const int channels = static_cast<int>(x.channels), groups = static_cast<int>(x.groups);
    T *means = shared, *deviations = shared + channels;
    T *group_means = deviations + channels, *group_rates = group_means + groups;
    if constexpr (phase == 0)
      for (int c = thread; c < channels; c += threads) {
        const Moments<T> moments = channel(image, c);
        means[c] = moments.mean + affine.pre_bias_at(image, c);
        deviations[c] = moments.deviations;
      }
    if constexpr (phase == 1)
      for (int g = thread; g < groups; g += threads) {
        const int size = channels / groups, first = g * size;
        const T samples = static_cast<T>(x.pixels), all = samples * static_cast<T>(size);
        const auto part = [&](int i) {
          return Moments<T>{means[first + i], deviations[first + i]};
        };
        const auto moments = merged(size, all, part, [&](int) { return samples; });
        group_means[g] = moments.mean;
        group_rates[g] = T(1) / sqrt(moments.deviations / all + eps);
      }
    if constexpr (phase == 2)
      for (int c = thread; c < channels; c += threads) {
        const int g = c / (channels / groups);
        write(image, c, means[c], group_means[g], group_rates[g]);
      }
  }

  BOTH_SIDES Moments<T> channel(int64_t image, int c) const {
    const int64_t plane = x.count * slices.count * x.channels;
    const T* means = partials + image * slices.count * x.channels + c;
    const auto part = [&](int slice) {
      const T* mean = means + slice * x.channels;
      return Moments<T>{mean[0], mean[plane]};
    };
    const auto count = [&](int slice) { return static_cast<T>(slices.size(slice, x.pixels)); };
    return merged(static_cast<int>(slices.count), static_cast<T>(x.pixels), part, count);
  }

  BOTH_SIDES void write(int64_t image, int c, T mean, T group_mean, T rate) const {
    const int64_t at = image * x.channels + c;
    const T scale = affine.scale_at(image, c);
    const T offset = (affine.pre_bias_at(image, c) - group_mean) * rate;
    const T gain = affine.weight_at(c) * scale;
    coefficients.a()[at] = rate * gain;
    coefficients.b()[at] =
        gain * offset + affine.bias_at(c) * scale + affine.shift_at(image, c);
    coefficients.r()[at] = rate;
    coefficients.o()[at] = offset;
    coefficients.total()[at] = static_cast<T>(x.pixels) * (mean - group_mean) * rate;
  }
};

// The same number of each channel of a thread.
template <class T, class Grid>
struct ChannelNumbers {
  T at[Grid::kChannels];

  BOTH_SIDES ChannelNumbers(const T* from, const Run& run, const Grid& grid) {
    using Numbers = Pack<T, Grid::kChannels>;
    const T* place = from + run.image * grid.channels + run.channel;
    const Numbers numbers = *reinterpret_cast<const Numbers*>(place);
CUSTOM_OPS_UNROLL
    for (int c = 0; c < Grid::kChannels; ++c) at[c] = numbers.at[c];
  }
  // Of sample k of a pack.
  BOTH_SIDES T of(int k) const { return at[Grid::kLast ? k : 0]; }
};

// Second pass forward: y = act(a x + b).
template <class S, class T, class Grid>
struct NormResults {
  static constexpr int kPhases = 1;
  static constexpr int kBatch = 4;
  using Samples = Pack<S, Grid::kSize>;
  using Numbers = ChannelNumbers<T, Grid>;

  const S* x;
  S* y;
  NormCoefficients<T> coefficients;
  bool silu;
  Grid grid;

  int shared_size() const { return 0; }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int, T*) const {
    const Run run = grid.run(grid.reversed(block), thread);
    if (run.count == 0) return;
    silu ? write<true>(run) : write<false>(run);
  }

  template <bool kSilu>
  BOTH_SIDES void write(const Run& run) const {
    const Numbers a(coefficients.a(), run, grid), b(coefficients.b(), run, grid);
    for (int i = 0; i < run.count; i += kBatch) {
      Samples packs[kBatch];
      read_packs<kBatch>(x, run, i, packs);
CUSTOM_OPS_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= run.count) break;
        Samples out;
CUSTOM_OPS_UNROLL
        for (int k = 0; k < Grid::kSize; ++k) {
          const T u = a.of(k) * to_number(packs[j].at[k]) + b.of(k);
          out.at[k] = from_number<S>(kSilu ? u * sigmoid_for<S>(u) : u);
        }
        *reinterpret_cast<Samples*>(y + run.begin + (i + j) * run.step) = out;
      }
    }
  }
};

// First pass backward: with d = act'(a x + b) dy, the sums of d and of d n for each channel and
// slice. partials: sums of d [count, slices, channels], then of d n.
template <class S, class T, class Grid>
struct NormGradientSums {
  static constexpr int kPhases = 2;
  static constexpr int kBatch = 2;
  using Samples = Pack<S, Grid::kSize>;
  using Numbers = ChannelNumbers<T, Grid>;

  const S *x, *gradient;
  NormCoefficients<T> coefficients;
  T* partials;
  bool silu;
  Grid grid;

  int shared_size() const { return 2 * grid.size(); }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int threads, T* shared) const {
    if constexpr (phase == 0) {
      const Run run = grid.run(block, thread);
      if (run.count) silu ? read<true>(run, thread, shared) : read<false>(run, thread, shared);
    }
    if constexpr (phase == 1) add(block, thread, threads, shared);
  }

  template <bool kSilu>
  BOTH_SIDES void read(const Run& run, int thread, T* shared) const {
    const Numbers a(coefficients.a(), run, grid), b(coefficients.b(), run, grid);
    const Numbers r(coefficients.r(), run, grid), o(coefficients.o(), run, grid);
    T sum[Grid::kChannels] = {}, product[Grid::kChannels] = {};
    for (int i = 0; i < run.count; i += kBatch) {
      Samples packs[kBatch], gradients[kBatch];
      read_packs<kBatch>(x, run, i, packs);
      read_packs<kBatch>(gradient, run, i, gradients);
CUSTOM_OPS_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= run.count) break;
CUSTOM_OPS_UNROLL
        for (int k = 0; k < Grid::kSize; ++k) {
          const int c = Grid::kLast ? k : 0;
          const T sample = to_number(packs[j].at[k]);
          T d = to_number(gradients[j].at[k]);
          if (kSilu) d *= silu_slope<S>(a.of(k) * sample + b.of(k));
          sum[c] += d;
          product[c] += d * (r.of(k) * sample + o.of(k));
        }
      }
    }
    const int row = grid.row(thread), column = grid.column(thread);
CUSTOM_OPS_UNROLL
    for (int c = 0; c < Grid::kChannels; ++c) {
      shared[grid.at(c, row, column)] = sum[c];
      shared[grid.size() + grid.at(c, row, column)] = product[c];
    }
  }

  BOTH_SIDES void add(int64_t block, int thread, int threads, const T* shared) const {
    const int filled = smaller(grid.rows, grid.packs(block));
    const int64_t slot = grid.image(block) * grid.slices.count + grid.slice(block);
    const int64_t plane = grid.count * grid.slices.count * grid.channels;
    for (int i = thread; i < grid.columns * Grid::kChannels; i += threads) {
      const int c = i % Grid::kChannels, column = i / Grid::kChannels;
      const int64_t channel = int64_t{grid.range(block)} * grid.columns * Grid::kChannels + i;
      if (channel >= grid.channels) break;
      T sum = 0, product = 0;
      for (int row = 0; row < filled; ++row) {
        sum += shared[grid.at(c, row, column)];
        product += shared[grid.size() + grid.at(c, row, column)];
      }
      partials[slot * grid.channels + channel] = sum;
      partials[plane + slot * grid.channels + channel] = product;
    }
  }
};

// Between the passes backward: sums of channels -> of groups -> the gradient of x as a d + p x + q,
// and the gradients of everything else, each for its image and channel.
template <class T>
struct NormBackwardSums {
  static constexpr int kPhases = 3;

  Grouped x;
  Slices slices;
  Affine<T> affine;
  const T* partials;
  NormCoefficients<T> coefficients;
  T* slopes;     // p, q [2, count, channels]
  T* gradients;  // of scale, shift, pre_bias, weight, bias [5, count, channels]
  ImageGrid grid;

  int shared_size() const { return static_cast<int>(2 * (x.channels + x.groups)); }

  template <int phase>
  BOTH_SIDES void run(int64_t image, int thread, int threads, T* shared) const {
    const int channels = static_cast<int>(x.channels), groups = static_cast<int>(x.groups);
    const int size = channels / groups;
    T *sums = shared, *products = shared + channels;
    T *group_sums = products + channels, *group_products = group_sums + groups;
    if constexpr (phase == 0)
      for (int c = thread; c < channels; c += threads) add(image, c, sums + c, products + c);
    if constexpr (phase == 1)
      for (int g = thread; g < groups; g += threads) {
        T sum = 0, product = 0;
        for (int c = g * size; c < (g + 1) * size; ++c) {
          const T gain = affine.weight_at(c) * affine.scale_at(image, c);
          sum += gain * sums[c];
          product += gain * products[c];
        }
        const T samples = static_cast<T>(x.pixels) * static_cast<T>(size);
        group_sums[g] = sum / samples;
        group_products[g] = product / samples;
      }
    if constexpr (phase == 2)
      for (int c = thread; c < channels; c += threads)
        write(image, c, sums[c], products[c], group_sums[c / size], group_products[c / size]);
  }

  BOTH_SIDES void add(int64_t image, int c, T* sum, T* product) const {
    const int64_t plane = x.count * slices.count * x.channels;
    const T* from = partials + image * slices.count * x.channels + c;
    *sum = *product = T(0);
    for (int64_t slice = 0; slice < slices.count; ++slice) {
      *sum += from[slice * x.channels];
      *product += from[plane + slice * x.channels];
    }
  }

  BOTH_SIDES void write(int64_t image, int c, T sum, T product, T group_sum,
                        T group_product) const {
    const int64_t plane = x.count * x.channels, at = image * x.channels + c;
    const T rate = coefficients.r()[at], offset = coefficients.o()[at];
    const T weight = affine.weight_at(c), scale = affine.scale_at(image, c);
    slopes[at] = -rate * rate * group_product;
    slopes[plane + at] = -rate * (group_sum + group_product * offset);
    gradients[at] = weight * product + affine.bias_at(c) * sum;
    gradients[plane + at] = sum;
    gradients[2 * plane + at] =
        rate * (weight * scale * sum - static_cast<T>(x.pixels) * group_sum -
                group_product * coefficients.total()[at]);
    gradients[3 * plane + at] = scale * product;
    gradients[4 * plane + at] = scale * sum;
  }
};

// Second pass backward: the gradient of x, a d + p x + q.
template <class S, class T, class Grid>
struct NormGradient {
  static constexpr int kPhases = 1;
  static constexpr int kBatch = 2;
  using Samples = Pack<S, Grid::kSize>;
  using Numbers = ChannelNumbers<T, Grid>;

  const S *x, *gradient;
  S* gradient_x;
  NormCoefficients<T> coefficients;
  const T* slopes;
  bool silu;
  Grid grid;

  int shared_size() const { return 0; }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int, T*) const {
    const Run run = grid.run(grid.reversed(block), thread);
    if (run.count == 0) return;
    silu ? write<true>(run) : write<false>(run);
  }

  template <bool kSilu>
  BOTH_SIDES void write(const Run& run) const {
    const Numbers a(coefficients.a(), run, grid), b(coefficients.b(), run, grid);
    const Numbers p(slopes, run, grid), q(slopes + coefficients.plane, run, grid);
    for (int i = 0; i < run.count; i += kBatch) {
      Samples packs[kBatch], gradients[kBatch];
      read_packs<kBatch>(x, run, i, packs);
      read_packs<kBatch>(gradient, run, i, gradients);
CUSTOM_OPS_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= run.count) break;
        Samples out;
CUSTOM_OPS_UNROLL
        for (int k = 0; k < Grid::kSize; ++k) {
          const T sample = to_number(packs[j].at[k]);
          T d = to_number(gradients[j].at[k]);
          if (kSilu) d *= silu_slope<S>(a.of(k) * sample + b.of(k));
          out.at[k] = from_number<S>(a.of(k) * d + (p.of(k) * sample + q.of(k)));
        }
        *reinterpret_cast<Samples*>(gradient_x + run.begin + (i + j) * run.step) = out;
      }
    }
  }
};

}  // namespace custom_ops
