// Memory, and the places of channels in it; arrays of a folded network.
//
// A map's channels have a logical number, as in the published network, and a place in storage: `Places` lists say which.
// Storage may hold gaps (the last block of a map, of a group or of a filter), whose values are always zero.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/kernels.h"

namespace mf::engine {

struct Array {
  const float* data;
  std::vector<long> shape;
};

using Arrays = std::map<std::string, Array>;
using Shapes = std::map<std::string, std::vector<long>>;

inline int blocks_of(int channels) { return (channels + BLOCK - 1) / BLOCK; }

// Memory of one network, handed out in the order of execution, aligned to vectors, zero at first.
class Arena {
 public:
  template <class T = float>
  T* take(size_t count) {
    return static_cast<T*>(bytes((count * sizeof(T) + 63) / 64 * 64));
  }

  // Bytes handed out so far, with what was left over at the ends of chunks
  size_t taken() const { return before_ + (chunks_.empty() ? 0 : chunks_.back().size - left_); }

  // What was handed out from the `begin`-th byte on, as far as it lies together and not beyond the `end`-th
  std::span<const char> range(size_t begin, size_t end) const;

 private:
  void* bytes(size_t size);
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct Chunk {
    std::unique_ptr<std::byte[], Free> memory;
    size_t size;
  };
  std::vector<Chunk> chunks_;
  size_t before_ = 0;  // bytes of all chunks but the last
  std::byte* next_ = nullptr;
  size_t left_ = 0;
};

// Logical number of the channel at a place in storage, -1 in a gap
using Places = std::vector<int>;

Places in_order(int channels);                                   // 0 1 2 ..., then the gap of the last block
Places in_filters(int channels, int multiplier, bool shuffled);  // all first filters, all second ones, each in blocks
Places in_groups(int channels, int groups);                      // each group in blocks of its own, shuffled

}  // namespace mf::engine
