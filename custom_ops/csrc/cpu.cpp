// The custom operations on a CPU, for float and double, contiguous or channels-last.
//
// A plain C interface, called through ctypes: no header of PyTorch is needed, so it builds in
// seconds. Every pointer is to memory of the caller; nothing is kept.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "activations.h"
#include "bias_act.h"
#include "exports.h"
#include "geometry.h"
#include "rows.h"
#include "vectors.h"

namespace custom_ops {
namespace {

constexpr int64_t kSharesPerThread = 4;
constexpr int64_t kLeastRows = 16;   // rows of a strip: fewer, and its margins cost more than it

// Cuts a batch of images into shares of equal work: planes or channel groups, and strips of rows.
class Shares {
 public:
  Shares(const Batch& batch, int64_t rows, int64_t threads)
      : batch_(batch), rows_(rows),
        lanes_(batch.channels_last ? std::min(kLanes, batch.channels) : 1),
        groups_(ceil_divide(batch.channels, lanes_)) {
    const int64_t wanted = ceil_divide(threads * kSharesPerThread, batch.count * groups_);
    strips_ = std::max<int64_t>(1, std::min(wanted, rows / kLeastRows));
  }

  int64_t size() const { return batch_.count * groups_ * strips_; }
  int64_t channels() const { return batch_.channels; }
  int64_t image(int64_t share) const { return share / strips_ / groups_; }
  int64_t channel(int64_t share) const { return share / strips_ % groups_ * lanes_; }
  int64_t lanes(int64_t share) const {
    return std::min(lanes_, batch_.channels - channel(share));
  }
  int64_t first_row(int64_t share) const { return share % strips_ * rows_ / strips_; }
  int64_t end_row(int64_t share) const { return (share % strips_ + 1) * rows_ / strips_; }

  // Where a share of images [height, width] begins, and its strides.
  Share layout(int64_t share, int64_t width) const {
    const int64_t pixel = batch_.channels_last ? batch_.channels : 1;
    return {width, lanes(share), pixel, width * pixel};
  }
  int64_t origin(int64_t share, int64_t height, int64_t width) const {
    const int64_t plane = height * width;
    const int64_t begin = image(share) * batch_.channels * plane;
    return begin + channel(share) * (batch_.channels_last ? 1 : plane);
  }

 private:
  Batch batch_;
  int64_t rows_, lanes_, groups_, strips_;
};

Components components_of_result(const Axis& axis, int64_t period, int64_t lanes) {
  const int64_t count = period / axis.down;
  return {count, 0, ceil_divide(axis.out, count), lanes};
}


// Run every share on one of the threads. A thread keeps its workspace while lanes stay the same.
template <class MakeWorkspace>
void for_each_share(const Shares& shares, int64_t threads, MakeWorkspace&& make_workspace) {
  const int64_t size = shares.size();
#pragma omp parallel num_threads(threads)
  {
    decltype(make_workspace(int64_t{1})) workspace;
    int64_t lanes = 0;
#pragma omp for schedule(dynamic)
    for (int64_t share = 0; share < size; ++share) {
      if (shares.lanes(share) != lanes) workspace = make_workspace(lanes = shares.lanes(share));
      workspace->run(shares, share);
    }
  }
}

template <class T>
struct Upfirdn2d {
  const T* x;
  T* y;
  Axis along_x, along_y;
  Filter<T> filter;

  class Workspace {
   public:
    Workspace(const Upfirdn2d& op, int64_t lanes)
        : op_(op), period_(std::lcm(op.along_x.up, op.along_x.down)),
          plan_(op.along_x, period_, components_of_result(op.along_x, period_, lanes)),
          stream_(plan_, op.along_y, op.filter),
          row_(static_cast<size_t>(plan_.result.allocated())) {}

    void run(const Shares& shares, int64_t share) {
      const Axis &ax = op_.along_x, &ay = op_.along_y;
      const Share in = shares.layout(share, ax.size), out = shares.layout(share, ax.out);
      const T* from = op_.x + shares.origin(share, ay.size, ax.size);
      T* to = op_.y + shares.origin(share, ay.out, ax.out);
      stream_.restart();
      for (int64_t o = shares.first_row(share); o < shares.end_row(share); ++o) {
        stream_.row(o, row_.data(), [&](int64_t i, T* raw) {
          take_row<T>(from + i * in.row_stride, in, nullptr, plan_.source, raw);
        });
        give_row(row_.data(), plan_.result, out, to + o * out.row_stride);
      }
    }

   private:
    const Upfirdn2d& op_;
    int64_t period_;
    RowPlan plan_;
    RowStream<T> stream_;
    std::vector<T> row_;
  };
};

// Upsample, change every sample, downsample. Forward: the change is a leaky ReLU whose slopes are
// noted. Backward: the gradient takes the same way with the resamplings transposed, and the change
// is a product with the noted slopes.
template <class T>
struct FilteredLrelu {
  const T *x, *bias;
  T* y;
  uint8_t* slopes;  // [image, channel, row, component, place], channels innermost in a share
  bool backward;
  Axis up_x, up_y, down_x, down_y;
  Filter<T> up, down;
  LeakyRelu<T> lrelu;

  class Workspace {
   public:
    Workspace(const FilteredLrelu& op, int64_t lanes)
        : op_(op), period_(std::lcm(op.up_x.up, op.down_x.down)),
          down_plan_(op.down_x, period_, components_of_result(op.down_x, period_, lanes)),
          up_plan_(op.up_x, period_, down_plan_.source),
          up_(up_plan_, op.up_y, op.up), down_(down_plan_, op.down_y, op.down),
          row_(static_cast<size_t>(down_plan_.result.allocated())) {}

    void run(const Shares& shares, int64_t share) {
      const Share in = shares.layout(share, op_.up_x.size);
      const Share out = shares.layout(share, op_.down_x.out);
      const T* from = op_.x + shares.origin(share, op_.up_y.size, op_.up_x.size);
      T* to = op_.y + shares.origin(share, op_.down_y.out, op_.down_x.out);
      const T* bias = op_.bias ? op_.bias + shares.channel(share) : nullptr;
      const int64_t channel = shares.image(share) * shares.channels() + shares.channel(share);
      up_.restart();
      down_.restart();
      for (int64_t o = shares.first_row(share); o < shares.end_row(share); ++o) {
        down_.row(o, row_.data(), [&](int64_t m, T* middle) {
          up_.row(m, middle, [&](int64_t i, T* raw) {
            take_row<T>(from + i * in.row_stride, in, bias, up_plan_.source, raw);
          });
          change(middle, channel, m);
        });
        give_row(row_.data(), down_plan_.result, out, to + o * out.row_stride);
      }
    }

   private:
    // Apply the change to row m of the upsampled image; beyond its ends there are zeros.
    void change(T* row, int64_t channel, int64_t m) {
      const Components& middle = down_plan_.source;
      const int64_t lanes = middle.lanes, places = ceil_divide(op_.up_x.out, period_);
      const int64_t row_slopes = period_ * places * lanes;
      uint8_t* slopes = op_.slopes;
      if (slopes) slopes += channel * op_.up_y.out * period_ * places + m * row_slopes;
      for (int64_t r = 0; r < period_; ++r) {
        const int64_t end = middle.first + middle.length;
        const int64_t to = std::max(middle.first, middle.to(r, op_.up_x.out));
        const int64_t from = std::min(to, middle.from());
        std::fill(row + middle.at(r, middle.first), row + middle.at(r, from), T(0));
        std::fill(row + middle.at(r, to), row + middle.at(r, end), T(0));
        uint8_t* noted = slopes ? slopes + (r * places + from) * lanes : nullptr;
        change_run(row + middle.at(r, from), noted, (to - from) * lanes);
      }
    }

    void change_run(T* samples, uint8_t* slopes, int64_t size) const {
      int64_t i = 0;
      for (; i + kVectorSize<T> <= size; i += kVectorSize<T>)
        change_block(samples + i, slopes ? slopes + i : nullptr);
      if (i == size) return;
      T rest[kVectorSize<T>] = {};
      uint8_t rest_slopes[kVectorSize<T>] = {};
      const auto left = static_cast<size_t>(size - i);
      std::copy_n(samples + i, left, rest);
      if (op_.backward) std::copy_n(slopes + i, left, rest_slopes);
      change_block(rest, slopes ? rest_slopes : nullptr);
      std::copy_n(rest, left, samples + i);
      if (slopes && !op_.backward) std::copy_n(rest_slopes, left, slopes + i);
    }

    void change_block(T* samples, uint8_t* slopes) const {
      if (op_.backward)
        multiply_by_slopes(op_.lrelu, samples, slopes);
      else
        activate_noting_slopes(op_.lrelu, samples, slopes);
    }

    const FilteredLrelu& op_;
    int64_t period_;
    RowPlan down_plan_, up_plan_;
    RowStream<T> up_, down_;
    std::vector<T> row_;
  };
};

template <class Op>
void run(const Op& op, const Batch& batch, int64_t rows, int64_t threads) {
  for_each_share(Shares(batch, rows, threads), threads, [&](int64_t lanes) {
    return std::make_unique<typename Op::Workspace>(op, lanes);
  });
}

// y[i] = value(x[i] + bias), or y[i] = x[i] * slope(seen[i] + bias) where x is a gradient. All are
// [outer, channels, inner] in memory, bias is [channels] or null.
template <class T>
struct BiasActPass {
  const T *x, *seen, *bias;
  T* y;
  int64_t outer, channels, inner;
  BiasAct<T> math;

  template <Activation act>
  void run(int64_t threads) const {
    const bool is_wide = inner == 1;
    const int64_t rows = is_wide ? outer : outer * channels, size = is_wide ? channels : inner;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = row * size;
      const T b = bias && !is_wide ? bias[row % channels] : T(0);
      const T* lanes = is_wide ? bias : nullptr;
      const auto biased = [&](T u, int64_t i) { return u + (lanes ? lanes[i] : b); };
      const T* from = x + begin;
      T* to = y + begin;
      if (seen) {
        const T* by = seen + begin;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i)
          to[i] = from[i] * math.template slope<act>(biased(by[i], i));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = math.template value<act>(biased(from[i], i));
      }
    }
  }
};

}  // namespace

// The others PyTorch computes with vectorised functions that a C++ compiler does not have (measured
// 2 to 12 times faster), and a bias alone has no backward pass to fuse.
bool takes_activation(Activation activation) {
  return activation == Activation::relu || activation == Activation::lrelu;
}

// A byte for each sample of the upsampled images, each row in its components.
int64_t slopes_size(const Batch& batch, const Axis* along) {
  const int64_t period = std::lcm(along[0].up, along[2].down);
  const int64_t row = period * ceil_divide(along[0].out, period);
  return batch.count * batch.channels * along[1].out * row;
}

// S and T are the same: a CPU computes with what it stores.
template <class S, class T>
struct Kernels {
  static const char* bias_act(const S* x, const S* seen, const S* bias, S* y, int64_t outer,
                              int64_t channels, int64_t inner, int64_t activation, double alpha,
                              double gain, double clamp, int64_t threads) {
    const BiasAct<T> math{T(alpha), T(gain), T(clamp)};
    const BiasActPass<T> pass{x, seen, bias, y, outer, channels, inner, math};
    if (activation == static_cast<int64_t>(Activation::relu))
      pass.template run<Activation::relu>(threads);
    else if (activation == static_cast<int64_t>(Activation::lrelu))
      pass.template run<Activation::lrelu>(threads);
    else
      return "an activation that the CPU kernels do not take";
    return nullptr;
  }

  // along: x, y.
  static const char* upfirdn2d(const S* x, S* y, const Batch* batch, const Axis* along,
                               const Filter<T>* filter, int64_t threads) {
    run(Upfirdn2d<T>{x, y, along[0], along[1], *filter}, *batch, along[1].out, threads);
    return nullptr;
  }

  // along: up x, up y, down x, down y. filters: up, down.
  static const char* filtered_lrelu(const S* x, const S* bias, S* y, uint8_t* slopes,
                                    int64_t backward, const Batch* batch, const Axis* along,
                                    const Filter<T>* filters, double gain, double slope,
                                    double clamp, int64_t threads) {
    const LeakyRelu<T> lrelu{T(gain), T(gain * slope), T(clamp)};
    const FilteredLrelu<T> op{x, bias, y, slopes, backward != 0, along[0], along[1], along[2],
                              along[3], filters[0], filters[1], lrelu};
    run(op, *batch, op.down_y.out, threads);
    return nullptr;
  }
};

}  // namespace custom_ops

CUSTOM_OPS_EXPORT_ANSWERS
CUSTOM_OPS_EXPORT(float, float, f32)
CUSTOM_OPS_EXPORT(double, double, f64)
