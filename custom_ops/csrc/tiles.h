// Resampling on a GPU: what each thread of a block does to a tile of the result, phase by phase.
//
// A block works on kLanes channels of a tile. It copies the part of the image that the tile depends
// on to shared memory, filters it along x and along y there, and writes the tile. Between two
// phases all threads wait for each other. No phase uses anything that only a GPU has, so
// emulated.cpp runs them on a CPU, where the tests compare them with the reference.
#pragma once

#include <cstdint>

#include "activations.h"
#include "geometry.h"
#include "numbers.h"

namespace custom_ops {

constexpr int kRun = 4;  // neighbouring results that one thread computes from the same inputs

// Division by a number that is the same for all threads, for n * divisor < 2^32.
struct Divider {
  uint32_t divisor = 1, factor = 0;

  Divider() = default;
  explicit Divider(int d)
      : divisor(static_cast<uint32_t>(d)),
        factor(static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor)) {}
  BOTH_SIDES uint32_t quotient(uint32_t n) const {
    return divisor == 1 ? n : static_cast<uint32_t>((uint64_t{n} * factor) >> 32);
  }
};

// A rectangle of samples in shared memory. Rows have an odd pitch: a column meets all banks.
struct Rectangle {
  int width = 0, height = 0, pitch = 0;
  Divider by_width, by_height;

  Rectangle() = default;
  Rectangle(int width, int height)
      : width(width), height(height), pitch(width | 1), by_width(width), by_height(height) {}
  int size() const { return pitch * height; }
};

BOTH_SIDES int round_up(int n) { return (n + kRun - 1) / kRun * kRun; }

// The first input that an output meets, and the tap that it meets there.
struct Begin {
  int64_t input;
  int phase;

  BOTH_SIDES Begin(const Axis& axis, int64_t output)
      : input(first_input(axis, output)),
        phase(static_cast<int>(tap_of(axis, input, output))) {}
};

// The same within a tile: how many inputs after the tile's first.
struct BeginInTile {
  int input, phase;
};

// Rates and taps of a line filter: constants, or 0 where they are known at run time only.
template <int kUp, int kDown, int kTaps>
struct Line {
  static constexpr bool kIsKnown = kTaps > 0;
  static_assert(!kIsKnown || kRun * kDown % kUp == 0, "every run starts at the same phase");

  // Where an output that starts a run begins, `output` after the first of its tile.
  static BOTH_SIDES BeginInTile begin(const Axis& axis, const Begin& tile, int output) {
    if constexpr (kIsKnown) return {output * kDown / kUp, tile.phase};
    return begin_anywhere(axis, tile, output);
  }

  // Where any output begins.
  static BOTH_SIDES BeginInTile begin_anywhere(const Axis& axis, const Begin& tile, int output) {
    const int up = static_cast<int>(axis.up), ahead = output * static_cast<int>(axis.down);
    const int input = ceil_divide(ahead - tile.phase, up);
    return {input, input * up + tile.phase - ahead};
  }

  // Add to run[r] the correlation with taps of the inputs that output r of a run meets. The first
  // input, at src, meets tap `phase`.
  template <class T>
  static BOTH_SIDES void correlate(const Axis& axis, const T* src, int src_stride, int phase,
                                   const T* taps, int taps_stride, T* run) {
    if constexpr (kIsKnown) {
      T w[kTaps + kUp - 1];
CUSTOM_OPS_UNROLL
      for (int k = 0; k < kTaps + kUp - 1; ++k) {
        const int tap = k - (kUp - 1) + phase;
        w[k] = tap >= 0 && tap < kTaps ? taps[tap * taps_stride] : T(0);
      }
      constexpr int inputs = ((kRun - 1) * kDown + kTaps - 1) / kUp + 1;
CUSTOM_OPS_UNROLL
      for (int i = 0; i < inputs; ++i) {
        const T sample = src[i * src_stride];
CUSTOM_OPS_UNROLL
        for (int r = 0; r < kRun; ++r) {
          const int k = i * kUp - r * kDown;
          if (k > -kUp && k < kTaps) run[r] += sample * w[k + kUp - 1];
        }
      }
    } else {
      const int up = static_cast<int>(axis.up), down = static_cast<int>(axis.down);
      for (int r = 0; r < kRun; ++r)
        for (int i = larger(0, ceil_divide(r * down - phase, up));; ++i) {
          const int tap = i * up + phase - r * down;
          if (tap >= axis.taps) break;
          run[r] += src[i * src_stride] * taps[tap * taps_stride];
        }
    }
  }
};

// One upfirdn2d between two rectangles.
template <class T, class LineX, class LineY, int kLanes>
struct TileResampling {
  Axis x, y;
  Filter<T> filter;
  Rectangle source, between, result;  // between: filtered along x, not along y

  // The sources of a result that is rounded up to whole runs.
  TileResampling(const Axis& x, const Axis& y, const Filter<T>& filter, const Rectangle& result)
      : x(x), y(y), filter(filter),
        source(needed(x, round_up(result.width)), needed(y, round_up(result.height))),
        between(round_up(result.width), source.height), result(result) {}

  // Taps a run may touch from its first input on, with the phase that wants most.
  static int needed(const Axis& axis, int outputs) {
    return static_cast<int>(((outputs - 1) * axis.down + axis.taps - 1) / axis.up + 1);
  }

  BOTH_SIDES int taps() const {
    return static_cast<int>(filter.plane ? x.taps * y.taps : x.taps + y.taps);
  }

  // Copy the taps to shared memory: plane, or x and y.
  BOTH_SIDES void copy_taps(int thread, int threads, T* shared) const {
    if (filter.plane) {
      for (int k = thread; k < x.taps * y.taps; k += threads) shared[k] = filter.plane[k];
      return;
    }
    for (int k = thread; k < x.taps; k += threads) shared[k] = filter.x[k];
    for (int k = thread; k < y.taps; k += threads) shared[x.taps + k] = filter.y[k];
  }

  // Filter along x. Neighbouring threads take neighbouring rows. (x0: first column of the result)
  BOTH_SIDES void along_x(int thread, int threads, int64_t x0, const T* taps, const T* from,
                          T* to) const {
    if (filter.plane) return;
    const Begin tile(x, x0);
    const int items = source.height * (between.width / kRun) * kLanes;
    for (int item = thread; item < items; item += threads) {
      const int lane = item % kLanes, rest = item / kLanes;
      const int group = static_cast<int>(source.by_height.quotient(rest));
      const int row = rest - group * source.height, column = group * kRun;
      const BeginInTile begin = LineX::begin(x, tile, column);
      T run[kRun] = {};
      const T* in = from + (row * source.pitch + begin.input) * kLanes + lane;
      LineX::correlate(x, in, kLanes, begin.phase, taps, 1, run);
      T* out = to + (row * between.pitch + column) * kLanes + lane;
CUSTOM_OPS_UNROLL
      for (int r = 0; r < kRun; ++r) out[r * kLanes] = run[r];
    }
  }

  // Filter along y (a plane: along both) and hand each run of results, one below the other, to
  // give(row, column, lane, run). Neighbouring threads take neighbouring columns.
  template <class Give>
  BOTH_SIDES void along_y(int thread, int threads, int64_t x0, int64_t y0, const T* taps,
                          const T* from, Give&& give) const {
    const Begin left(x, x0), top(y, y0);
    const int items = result.width * (round_up(result.height) / kRun) * kLanes;
    for (int item = thread; item < items; item += threads) {
      const int lane = item % kLanes, rest = item / kLanes;
      const int group = static_cast<int>(result.by_width.quotient(rest));
      const int column = rest - group * result.width, row = group * kRun;
      const BeginInTile begin = LineY::begin(y, top, row);
      T run[kRun] = {};
      if (filter.plane) {
        const BeginInTile across = LineX::begin_anywhere(x, left, column);
        const T* src = from + begin.input * source.pitch * kLanes + lane;
        int i = across.input;
        for (int tap = across.phase; tap < x.taps; tap += static_cast<int>(x.up), ++i)
          LineY::correlate(y, src + i * kLanes, source.pitch * kLanes, begin.phase, taps + tap,
                           static_cast<int>(x.taps), run);
      } else {
        const T* src = from + (begin.input * between.pitch + column) * kLanes + lane;
        LineY::correlate(y, src, between.pitch * kLanes, begin.phase, taps + x.taps, 1, run);
      }
      give(row, column, lane, run);
    }
  }
};

// Which tile of which channels a block works on.
template <int kLanes>
struct TileGrid {
  Batch batch;
  int64_t tiles_x, tiles_y, groups;

  TileGrid(const Batch& batch, const Axis& x, const Axis& y, const Rectangle& tile)
      : batch(batch), tiles_x(ceil_divide<int64_t>(x.out, tile.width)),
        tiles_y(ceil_divide<int64_t>(y.out, tile.height)),
        groups(ceil_divide<int64_t>(batch.channels, kLanes)) {}

  int64_t blocks() const { return batch.count * groups * tiles_y * tiles_x; }

  struct Place {
    int64_t x, y, image, channel;
  };
  BOTH_SIDES Place place(int64_t block, const Rectangle& tile) const {
    const int64_t row = block / tiles_x, share = row / tiles_y;
    return {(block - row * tiles_x) * tile.width, (row - share * tiles_y) * tile.height,
            share / groups, share % groups * kLanes};
  }

  // Where a sample of images of this size stands in memory.
  BOTH_SIDES int64_t at(const Place& place, int lane, int64_t row, int64_t column, int64_t height,
                        int64_t width) const {
    const int64_t channel = place.channel + lane;
    if (batch.channels_last)
      return ((place.image * height + row) * width + column) * batch.channels + channel;
    return ((place.image * batch.channels + channel) * height + row) * width + column;
  }
};

// Copy the part of an image that begins at a row and a column to shared memory, with its bias.
template <class S, class T, int kLanes>
BOTH_SIDES void copy_part(int thread, int threads, const TileGrid<kLanes>& grid,
                          const typename TileGrid<kLanes>::Place& place, const S* x, const S* bias,
                          const Axis& along_x, const Axis& along_y, int64_t first_row,
                          int64_t first_column, const Rectangle& part, T* shared) {
  const int items = part.width * part.height * kLanes;
  for (int item = thread; item < items; item += threads) {
    const int lane = item % kLanes, rest = item / kLanes;
    const int row = static_cast<int>(part.by_width.quotient(rest));
    const int column = rest - row * part.width;
    const int64_t from_row = first_row + row, from_column = first_column + column;
    const bool inside = from_row >= 0 && from_row < along_y.size && from_column >= 0 &&
                        from_column < along_x.size && place.channel + lane < grid.batch.channels;
    T sample = 0;
    if (inside) {
      const int64_t height = along_y.size, width = along_x.size;
      sample = to_number(x[grid.at(place, lane, from_row, from_column, height, width)]);
      if (bias) sample += to_number(bias[place.channel + lane]);
    }
    shared[(row * part.pitch + column) * kLanes + lane] = sample;
  }
}

template <class S, class T, class LineX, class LineY, int kLanes>
struct Upfirdn2dTile {
  static constexpr int kPhases = 3;

  const S* x;
  S* y;
  TileResampling<T, LineX, LineY, kLanes> step;
  TileGrid<kLanes> grid;

  Upfirdn2dTile(const S* x, S* y, const Batch& batch, const Axis* along, const Filter<T>& filter,
                int tile_width, int tile_height)
      : x(x), y(y), step(along[0], along[1], filter, Rectangle(tile_width, tile_height)),
        grid(batch, along[0], along[1], step.result) {}

  int shared_size() const {
    const int between = step.filter.plane ? 0 : step.between.size();
    return step.taps() + (step.source.size() + between) * kLanes;
  }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int threads, T* shared) const {
    const auto place = grid.place(block, step.result);
    T* source = shared + step.taps();
    T* between = source + step.source.pitch * step.source.height * kLanes;
    if constexpr (phase == 0) {
      step.copy_taps(thread, threads, shared);
      copy_part<S, T, kLanes>(thread, threads, grid, place, x, nullptr, step.x, step.y,
                              first_input(step.y, place.y), first_input(step.x, place.x),
                              step.source, source);
    } else if constexpr (phase == 1) {
      step.along_x(thread, threads, place.x, shared, source, between);
    } else {
      const T* from = step.filter.plane ? source : between;
      step.along_y(thread, threads, place.x, place.y, shared, from,
                   [&](int row, int column, int lane, const T* run) {
                     give(place, row, column, lane, run);
                   });
    }
  }

  BOTH_SIDES void give(const typename TileGrid<kLanes>::Place& place, int row, int column, int lane,
                       const T* run) const {
    if (place.x + column >= step.x.out || place.channel + lane >= grid.batch.channels) return;
CUSTOM_OPS_UNROLL
    for (int r = 0; r < kRun; ++r)
      if (row + r < step.result.height && place.y + row + r < step.y.out)
        y[grid.at(place, lane, place.y + row + r, place.x + column, step.y.out, step.x.out)] =
            from_number<S>(run[r]);
  }
};

// See FilteredLrelu in cpu.cpp. Slopes are kept in two bits, four rows to a byte:
// [image, channel, row / 4, column].
template <class S, class T, class LineUp, class LineDown, int kLanes>
struct FilteredLreluTile {
  static constexpr int kPhases = 5;
  using Place = typename TileGrid<kLanes>::Place;

  const S *x, *bias;
  S* y;
  uint8_t* slopes;
  bool backward;
  LeakyRelu<T> lrelu;
  TileResampling<T, LineDown, LineDown, kLanes> down;
  TileResampling<T, LineUp, LineUp, kLanes> up;
  TileGrid<kLanes> grid;
  int large, small;  // sizes of the two buffers that take turns

  FilteredLreluTile(const S* x, const S* bias, S* y, uint8_t* slopes, bool backward,
                    const LeakyRelu<T>& lrelu, const Batch& batch, const Axis* along,
                    const Filter<T>* filters, int tile_width, int tile_height)
      : x(x), bias(bias), y(y), slopes(slopes), backward(backward), lrelu(lrelu),
        down(along[2], along[3], filters[1], Rectangle(tile_width, tile_height)),
        up(along[0], along[1], filters[0],
           Rectangle(round_up(down.source.width), round_up(down.source.height))),
        grid(batch, along[2], along[3], down.result),
        large(larger(up.source.size(), up.filter.plane ? 0 : up.result.size()) * kLanes),
        small(larger(up.filter.plane ? 0 : up.between.size(),
                     down.filter.plane ? 0 : down.between.pitch * up.result.height) * kLanes) {
    down.source = up.result;  // rounded up
    down.between = Rectangle(down.between.width, down.source.height);
  }

  // A plane reads its sources while the results are written: they cannot share a buffer.
  int shared_size() const {
    const int apart = up.filter.plane ? up.result.size() * kLanes : 0;
    return up.taps() + down.taps() + large + small + apart;
  }

  template <int phase>
  BOTH_SIDES void run(int64_t block, int thread, int threads, T* shared) const {
    const Place place = grid.place(block, down.result);
    const int64_t middle_x = first_input(down.x, place.x), middle_y = first_input(down.y, place.y);
    T* taps_up = shared;
    T* taps_down = taps_up + up.taps();
    T* one = taps_down + down.taps();
    T* two = one + large;
    T* middle = up.filter.plane ? two + small : one;
    if constexpr (phase == 0) {
      up.copy_taps(thread, threads, taps_up);
      down.copy_taps(thread, threads, taps_down);
      copy_part<S, T, kLanes>(thread, threads, grid, place, x, bias, up.x, up.y,
                              first_input(up.y, middle_y), first_input(up.x, middle_x), up.source,
                              one);
    } else if constexpr (phase == 1) {
      up.along_x(thread, threads, middle_x, taps_up, one, two);
    } else if constexpr (phase == 2) {
      up.along_y(thread, threads, middle_x, middle_y, taps_up, up.filter.plane ? one : two,
                 [&](int row, int column, int lane, T* run) {
                   change(place, middle_y + row, middle_x + column, lane, run);
                   for (int r = 0; r < kRun; ++r)
                     middle[((row + r) * up.result.pitch + column) * kLanes + lane] = run[r];
                 });
    } else if constexpr (phase == 3) {
      down.along_x(thread, threads, place.x, taps_down, middle, two);
    } else {
      down.along_y(thread, threads, place.x, place.y, taps_down, down.filter.plane ? middle : two,
                   [&](int row, int column, int lane, const T* run) {
                     give(place, row, column, lane, run);
                   });
    }
  }

  // Apply the activation, or its noted slopes, to a run; beyond the image there are zeros.
  BOTH_SIDES void change(const Place& place, int64_t row, int64_t column, int lane, T* run) const {
    const int64_t width = up.x.out, height = up.y.out, channel = place.channel + lane;
    const bool inside = column >= 0 && column < width && channel < grid.batch.channels;
    const int64_t plane = place.image * grid.batch.channels + channel;
    uint8_t* noted = slopes + plane * ((height + 3) / 4) * width + column;
    int bits = 0;
CUSTOM_OPS_UNROLL
    for (int r = 0; r < kRun; ++r) {
      if (!inside || row + r < 0 || row + r >= height) {
        run[r] = T(0);
      } else if (backward) {
        const int64_t at = row + r;
        run[r] *= lrelu.derivative(noted[at / 4 * width] >> (at % 4 * 2) & 3);
      } else {
        bits |= lrelu.slope(run[r]) << (r * 2);
        run[r] = lrelu.value(run[r]);
      }
    }
    // forward, a run begins at a multiple of 4: tiles have even height, and down.before is 0
    if (inside && !backward && slopes && row < height) noted[row / 4 * width] = bits;
  }

  BOTH_SIDES void give(const Place& place, int row, int column, int lane, const T* run) const {
    if (place.x + column >= down.x.out || place.channel + lane >= grid.batch.channels) return;
CUSTOM_OPS_UNROLL
    for (int r = 0; r < kRun; ++r)
      if (row + r < down.result.height && place.y + row + r < down.y.out)
        y[grid.at(place, lane, place.y + row + r, place.x + column, down.y.out, down.x.out)] =
            from_number<S>(run[r]);
  }
};

}  // namespace custom_ops
