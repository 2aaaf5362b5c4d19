// Predicts how long a transfer will take from how long earlier ones took. Knows numbers only: no clock, no connection, no lock.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>

namespace tcpx {

/// A line (fixed cost plus cost per byte) through past transfers, of which recent ones count more.
class CostModel {
 public:
  struct Estimate {
    double seconds;
    double margin;
  };

  /// @param bytes        Size of a transfer that ended well.
  /// @param seconds      How long it took.
  /// @param uncertainty  Half-width of `seconds`: the end was only seen at the next poll.
  void add(double bytes, double seconds, double uncertainty) {
    // The error is judged against what would have been predicted without this sample; the first one had no prediction.
    if (auto before = predict(bytes); before && seconds > 0) {
      const double miss = (std::abs(*before - seconds) + uncertainty) / seconds;
      relative_error_ = 0.8 * relative_error_ + 0.2 * std::min(miss, 1.0);
    }
    constexpr double kDecay = 0.9;
    for (double *sum : {&weight_, &x_, &y_, &xx_, &xy_}) *sum *= kDecay;
    weight_ += 1;
    x_ += bytes;
    y_ += seconds;
    xx_ += bytes * bytes;
    xy_ += bytes * seconds;
    smallest_ = samples_ == 0 ? bytes : std::min(smallest_, bytes);
    largest_ = samples_ == 0 ? bytes : std::max(largest_, bytes);
    ++samples_;
  }

  /// Nothing when nothing was measured yet.
  std::optional<Estimate> estimate(double bytes) const {
    const auto seconds = predict(bytes);
    if (!seconds) return std::nullopt;
    double margin = *seconds * relative_error_;
    // Sizes far from everything measured: the line is a guess there, and the margin says so.
    if (bytes > 4 * largest_ || bytes * 4 < smallest_) margin = std::max(margin, *seconds);
    return Estimate{*seconds, margin};
  }

 private:
  std::optional<double> predict(double bytes) const {
    if (samples_ == 0) return std::nullopt;
    const double mean_x = x_ / weight_, mean_y = y_ / weight_;
    const double variance = xx_ / weight_ - mean_x * mean_x;
    if (variance > 0.01 * mean_x * mean_x) {
      const double slope = (xy_ / weight_ - mean_x * mean_y) / variance;
      const double fixed = mean_y - slope * mean_x;
      if (slope > 0 && fixed >= 0) return fixed + slope * bytes;
      // A negative fixed cost, or bytes that cost nothing, is noise: the best line through the origin then.
      return std::max(xy_ / xx_ * bytes, 0.0);
    }
    // One size only: what part of its time is fixed is unknown. Larger ones are scaled, smaller ones take at most as long.
    return mean_x > 0 && bytes > mean_x ? mean_y * bytes / mean_x : mean_y;
  }

  double weight_ = 0, x_ = 0, y_ = 0, xx_ = 0, xy_ = 0;
  double smallest_ = 0, largest_ = 0;
  double relative_error_ = 1;
  std::size_t samples_ = 0;
};

}  // namespace tcpx
