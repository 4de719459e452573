// What a member of the team carries from layer to layer: where it waits for the others, the weights that it prefetches,
// its clock.
#pragma once

#include <algorithm>

#include "engine/call.h"
#include "engine/storage.h"
#include "engine/team.h"

namespace mf::engine {

// Weights are read once for the images at work: by the time they are needed again, the cache holds other ones, and
// linear layers of a few tokens wait for the memory. So what is read within the next megabytes is prefetched while
// convolutions leave the memory idle, each member taking its share of the lines.
class Prefetcher {
 public:
  // `end`: bytes of the weights before those that these images do not read
  Prefetcher(const Arena& weights, size_t end, const Worker& worker)
      : weights_(weights), end_(end), rank_(worker.rank), size_(worker.size) {}

  // `at`: bytes of the weights before those that come next
  void move_to(size_t at) {
    // what has been read meanwhile is not prefetched either
    if (const size_t left = lines_.end - lines_.at; prefetched_ - left < at) {
      lines_ = {};
      prefetched_ = at;
    }
    until_ = std::min(end_, at + DISTANCE);
  }

  // For a kernel, which moves it on
  Prefetch* lines() {
    if (lines_.at >= lines_.end && prefetched_ < until_) {
      const auto range = weights_.range(prefetched_, until_);
      prefetched_ += range.size();
      lines_ = {range.data() + 64 * rank_, range.data() + range.size(), ptrdiff_t(64) * size_};
    }
    return &lines_;
  }

 private:
  static constexpr size_t DISTANCE = size_t(4) << 20;  // three times as much gains hardly more: docs/engine.md

  const Arena& weights_;
  const size_t end_;
  const int rank_, size_;
  Prefetch lines_;
  size_t prefetched_ = 0,
         until_ = 0;  // bytes of the weights: before what is not in lines_ yet, and as far as that goes
};

struct Member {
  Worker& worker;
  Prefetcher prefetch;
  Timer timer;
};

}  // namespace mf::engine
