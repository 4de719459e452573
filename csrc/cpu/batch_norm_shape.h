// How the work on a map with BatchNorm is cut, and the norm of every channel.
#pragma once

#include "common/math.h"
#include "cpu/boundary.h"

namespace mf {

// y = x scale + shift, by channel; the slopes of a dynamic ReLU by sample and channel, else null
template <class A>
struct ChannelNorm {
  const A *mean, *scale, *shift;  // [C]
  const A *slope1, *slope2;       // [B][C]
};

// A channels_last map as samples of L positions with slopes of their own; one sample, where there are no such slopes.
// A task is some whole samples or one strip of a sample, and leaves its sums as one part.
struct NormTasks {
  static constexpr int64_t BYTES = 256 * 1024;  // a task's map: it stays in the second-level cache for a second pass
  static constexpr int64_t LONGEST = 64;     // values of a channel summed in one accumulator: its error grows with them
  int64_t samples, L, strips, strip, group;  // strips of `strip` positions, or groups of whole samples

  NormTasks(const FeatureMap& x, bool by_sample, int64_t bytes)
      : samples(by_sample ? x.batch : 1), L(by_sample ? x.positions() : x.batch * x.positions()) {
    const int64_t fit = std::clamp<int64_t>(BYTES / (x.channels * bytes), 16, LONGEST);
    strips = ceil_div(L, fit);
    strip = strips > 1 ? fit : L;
    group = strips > 1 ? 1 : std::max<int64_t>(1, fit / std::max<int64_t>(1, L));
  }
  int64_t count() const { return strips * ceil_div(samples, group); }

  struct Task {
    int64_t first, last, position, L;  // samples [first, last), L positions of each, the first one of the whole map
  };
  Task task(int64_t i) const {
    const int64_t first = i / strips * group, begin = i % strips * strip;
    return {first, std::min(first + group, samples), first * L + begin, std::min(strip, L - begin)};
  }
};

}  // namespace mf
