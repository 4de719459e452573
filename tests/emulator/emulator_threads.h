// The engine with one host thread for each CUDA thread: nothing orders their memory but the barriers that a kernel has.
#pragma once

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

namespace mf_emulator {

struct Warp {
  explicit Warp(int threads) : barrier(threads) {}
  std::barrier<> barrier;
  uint32_t exchanged[WARP];
};

struct Thread {
  Index index, block;
  Warp* warp = nullptr;
  std::barrier<>* of_block = nullptr;
};

inline thread_local Thread self;

inline const Index& thread_index() { return self.index; }
inline const Index& block_index() { return self.block; }
inline void block_barrier() { self.of_block->arrive_and_wait(); }
inline void warp_barrier() { self.warp->barrier.arrive_and_wait(); }
inline uint32_t* exchange() { return self.warp->exchanged; }

// Calls `body` once for each thread of each block; the same host threads serve all blocks
inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  std::barrier<> between(threads);
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<std::barrier<>> of_block;
  std::vector<std::thread> crew;
  const auto renew = [&] {  // barriers that threads dropped out of are not used again
    warps.clear();
    for (int w = 0; w < threads / WARP; ++w) warps.push_back(std::make_unique<Warp>(WARP));
    of_block = std::make_unique<std::barrier<>>(threads);
  };
  for (int t = 0; t < threads; ++t) {
    crew.emplace_back([&, t] {
      for (int64_t b = 0; b < blocks; ++b) {
        if (t == 0) renew();
        between.arrive_and_wait();
        self = {{unsigned(t)}, {unsigned(b)}, warps[t / WARP].get(), of_block.get()};
        body();
        self.warp->barrier.arrive_and_drop();
        self.of_block->arrive_and_drop();
        between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : crew) thread.join();
}

}  // namespace mf_emulator
