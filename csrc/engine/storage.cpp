// Memory, and the places of channels in it.
#include <algorithm>
#include <cstring>
#include <new>

#include "engine/storage.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mf::engine {

void* Arena::bytes(size_t size) {
  if (size > left_) {
    // Weights are read once an image, from end to end: in large pages that takes a hundredth of the address lookups.
    constexpr size_t page = size_t(1) << 21;
    const size_t chunk = (std::max(size, 2 * page) + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, chunk);
    if (!memory) throw std::bad_alloc();
    before_ = taken() + left_;
    chunks_.push_back({std::unique_ptr<std::byte[], Free>(static_cast<std::byte*>(memory)), chunk});
#if defined(__linux__)
    madvise(memory, chunk, MADV_HUGEPAGE);  // a wish: where it is not granted, pages are small
#endif
    std::memset(memory, 0, chunk);
    next_ = static_cast<std::byte*>(memory);
    left_ = chunk;
  }
  std::byte* taken = next_;
  next_ += size;
  left_ -= size;
  return taken;
}

std::span<const char> Arena::range(size_t begin, size_t end) const {
  size_t before = 0;
  for (const Chunk& chunk : chunks_) {
    if (begin < before + chunk.size) {
      const char* memory = reinterpret_cast<const char*>(chunk.memory.get());
      return {memory + (begin - before), memory + (std::min(end, before + chunk.size) - before)};
    }
    before += chunk.size;
  }
  return {};
}

Places in_order(int channels) {
  Places places(size_t(blocks_of(channels)) * BLOCK, -1);
  for (int i = 0; i < channels; ++i) places[i] = i;
  return places;
}

Places in_filters(int channels, int multiplier, bool shuffled) {
  const int width = blocks_of(channels) * BLOCK;
  Places places(size_t(multiplier) * width, -1);
  for (int m = 0; m < multiplier; ++m) {
    for (int c = 0; c < channels; ++c) places[m * width + c] = shuffled ? m * channels + c : c * multiplier + m;
  }
  return places;
}

Places in_groups(int channels, int groups) {
  const int each = channels / groups, width = blocks_of(each) * BLOCK;
  Places places(size_t(groups) * width, -1);
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < each; ++i) places[g * width + i] = groups > 1 ? i * groups + g : i;
  }
  return places;
}

}  // namespace mf::engine
