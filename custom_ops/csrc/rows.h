// Resampling on a CPU, one row after the other, so that everything in between stays in cache.
//
// A row is kept as its polyphase components: with L a common multiple of up and down, sample
// L q + r stands at place q of component r. Then every tap of every component is one product of
// a number and a run of neighbouring memory, whatever up and down are. A sample is `lanes`
// numbers: one of a plane in contiguous images, several channels in channels-last images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "geometry.h"
#include "vectors.h"

namespace custom_ops {

// Where the samples of a row stand: places [first, first + length) of each component.
struct Components {
  int64_t count, first, length, lanes, pitch;

  Components(int64_t count, int64_t first, int64_t length, int64_t lanes)
      : count(count), first(first), length(length), lanes(lanes),
        pitch((length * lanes + 15) / 16 * 16) {}

  int64_t size() const { return count * pitch; }
  int64_t allocated() const { return size() + 16; }  // weighted_sum may overrun by a vector
  int64_t at(int64_t component, int64_t place) const {
    return component * pitch + (place - first) * lanes;
  }
  // Places of a component that hold samples [0, samples): from, to (exclusive).
  int64_t from() const { return std::max<int64_t>(0, first); }
  int64_t to(int64_t component, int64_t samples) const {
    return std::min(first + length, ceil_divide(samples - component, count));
  }
};

// One axis along x: each component of the result is a sum of runs of components of the source.
class RowPlan {
 public:
  struct Term {
    int64_t offset, tap;
  };

  RowPlan(const Axis& axis, int64_t period, const Components& result)
      : axis(axis), result(result), source(needed(axis, period, result)),
        terms(static_cast<size_t>(result.count)) {
    for (int64_t s = 0; s < result.count; ++s)
      for (int64_t j = first_input(axis, s); j <= last_input(axis, s); ++j) {
        const int64_t shift = floor_divide(j, source.count);
        const int64_t component = j - shift * source.count;
        terms[s].push_back({source.at(component, result.first + shift), tap_of(axis, j, s)});
      }
  }

  Axis axis;
  Components result, source;
  std::vector<std::vector<Term>> terms;

 private:
  static Components needed(const Axis& axis, int64_t period, const Components& result) {
    const int64_t count = period / axis.up;
    const int64_t low = floor_divide(first_input(axis, 0), count);
    const int64_t high = floor_divide(last_input(axis, result.count - 1), count);
    return {count, result.first + low, result.length + std::max<int64_t>(0, high - low),
            result.lanes};
  }
};

// Produces the rows of a resampled image from the top down. Source rows are asked for once each.
template <class T>
class RowStream {
 public:
  RowStream(const RowPlan& along_x, const Axis& along_y, const Filter<T>& filter)
      : along_x_(along_x), along_y_(along_y), filter_(filter), kept_(kept(along_x, filter)),
        ring_rows_((along_y.taps - 1) / along_y.up + 1),
        ring_(static_cast<size_t>(ring_rows_ * kept_.allocated())),
        raw_(static_cast<size_t>(along_x.source.allocated())) {}

  void restart() { next_ = 0; }

  // Write row o to dst, laid out as along_x.result; make_row(i, to) writes source row i.
  template <class MakeRow>
  void row(int64_t o, T* dst, MakeRow&& make_row) {
    const int64_t first = std::max<int64_t>(0, first_input(along_y_, o));
    const int64_t last = std::min(along_y_.size - 1, last_input(along_y_, o));
    for (next_ = std::max(next_, first); next_ <= last; ++next_) take_in(next_, make_row);
    if (filter_.plane)
      combine_plane(o, first, last, dst);
    else
      combine_rows(o, first, last, dst);
  }

 private:
  static const Components& kept(const RowPlan& plan, const Filter<T>& filter) {
    return filter.plane ? plan.source : plan.result;
  }

  T* slot(int64_t i) { return ring_.data() + i % ring_rows_ * kept_.allocated(); }

  template <class MakeRow>
  void take_in(int64_t i, MakeRow&& make_row) {
    if (filter_.plane) return make_row(i, slot(i));
    make_row(i, raw_.data());
    for (size_t s = 0; s < along_x_.terms.size(); ++s) {
      clear();
      for (const auto& term : along_x_.terms[s])
        add(raw_.data() + term.offset, filter_.x[term.tap]);
      sum(s, slot(i));
    }
  }

  void combine_rows(int64_t o, int64_t first, int64_t last, T* dst) {
    clear();
    for (int64_t i = first; i <= last; ++i) add(slot(i), filter_.y[tap_of(along_y_, i, o)]);
    weighted_sum(dst, along_x_.result.size(), sources_, weights_.data());
  }

  void combine_plane(int64_t o, int64_t first, int64_t last, T* dst) {
    for (size_t s = 0; s < along_x_.terms.size(); ++s) {
      clear();
      for (int64_t i = first; i <= last; ++i) {
        const T* taps = filter_.plane + tap_of(along_y_, i, o) * along_x_.axis.taps;
        for (const auto& term : along_x_.terms[s]) add(slot(i) + term.offset, taps[term.tap]);
      }
      sum(s, dst);
    }
  }

  void clear() {
    sources_.clear();
    weights_.clear();
  }

  void add(const T* source, T weight) {
    sources_.push_back(source);
    weights_.push_back(weight);
  }

  void sum(size_t component, T* dst) {
    const auto& result = along_x_.result;
    weighted_sum(dst + static_cast<int64_t>(component) * result.pitch,
                 result.length * result.lanes, sources_, weights_.data());
  }

  const RowPlan& along_x_;
  Axis along_y_;
  Filter<T> filter_;
  Components kept_;
  int64_t ring_rows_, next_ = 0;
  std::vector<T> ring_, raw_;
  std::vector<const T*> sources_;
  std::vector<T> weights_;
};

// A share of an image batch that one thread works on: some channels of one image.
struct Share {
  int64_t width, lanes, pixel_stride, row_stride;
};

constexpr int64_t kLanes = 16;  // channels of a channels-last image that are worked on at once

// Copy pixels of some channels. That these are often kLanes, a compiler cannot know: told, it makes
// one instruction of each pixel.
template <class T>
void copy_pixels(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t pixels,
                 int64_t lanes, const T* bias) {
  if (lanes == kLanes) {
    T add[kLanes] = {};
    if (bias) std::copy_n(bias, kLanes, add);
    for (int64_t q = 0; q < pixels; ++q, from += from_step, to += to_step)
      for (int64_t c = 0; c < kLanes; ++c) to[c] = from[c] + add[c];
    return;
  }
  for (int64_t q = 0; q < pixels; ++q, from += from_step, to += to_step)
    for (int64_t c = 0; c < lanes; ++c) to[c] = bias ? from[c] + bias[c] : from[c];
}

// Copy a row of an image into its components, bias (one number a lane) added; outside stays zero.
template <class T>
void take_row(const T* row, const Share& share, const T* bias, const Components& to, T* dst) {
  for (int64_t p = 0; p < to.count; ++p) {
    const int64_t from = to.from(), end = to.to(p, share.width);
    T* out = dst + to.at(p, from);
    const T* in = row + (from * to.count + p) * share.pixel_stride;
    const int64_t step = to.count * share.pixel_stride;
    if (share.lanes == 1) {
      const T b = bias ? bias[0] : T(0);
      if (step == 1)
        for (int64_t q = 0; q < end - from; ++q) out[q] = in[q] + b;
      else
        for (int64_t q = 0; q < end - from; ++q) out[q] = in[q * step] + b;
    } else {
      copy_pixels(in, step, out, share.lanes, end - from, share.lanes, bias);
    }
  }
}

// Copy the components of a row to an image.
template <class T>
void give_row(const T* src, const Components& from, const Share& share, T* row) {
  if (share.pixel_stride == 1 && from.count == 2) {  // both at once: whole cache lines are written
    const T *even = src + from.at(0, 0), *odd = src + from.at(1, 0);
    for (int64_t q = 0; q < share.width / 2; ++q) row[2 * q] = even[q], row[2 * q + 1] = odd[q];
    if (share.width % 2) row[share.width - 1] = even[share.width / 2];
    return;
  }
  for (int64_t p = 0; p < from.count; ++p) {
    const T* in = src + from.at(p, 0);
    T* out = row + p * share.pixel_stride;
    const int64_t step = from.count * share.pixel_stride, places = from.to(p, share.width);
    if (share.lanes == 1)
      for (int64_t q = 0; q < places; ++q) out[q * step] = in[q];
    else
      copy_pixels<T>(in, share.lanes, out, step, places, share.lanes, nullptr);
  }
}

}  // namespace custom_ops
