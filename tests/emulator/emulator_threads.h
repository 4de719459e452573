// The engine with one host thread for each CUDA thread: nothing orders their memory but the barriers that a kernel has.
#pragma once

#include <barrier>
#include <map>
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

// Host threads that stay from one launch to the next: to start one costs a sanitizer more than what it runs
class Crew {
 public:
  explicit Crew(int threads) : turn_(threads + 1), between_(threads) {
    for (int t = 0; t < threads; ++t) members_.emplace_back([this, t] { serve(t); });
  }

  ~Crew() {
    body_ = nullptr;
    turn_.arrive_and_wait();
    for (std::thread& member : members_) member.join();
  }

  void run(int64_t blocks, const std::function<void()>& body) {
    blocks_ = blocks, body_ = &body;
    turn_.arrive_and_wait();
    turn_.arrive_and_wait();
  }

 private:
  void serve(int t) {
    while (true) {
      turn_.arrive_and_wait();
      if (body_ == nullptr) return;
      for (int64_t b = 0; b < blocks_; ++b) {
        if (t == 0) renew();
        between_.arrive_and_wait();
        self = {{unsigned(t)}, {unsigned(b)}, warps_[t / WARP].get(), of_block_.get()};
        (*body_)();
        self.warp->barrier.arrive_and_drop();
        self.of_block->arrive_and_drop();
        between_.arrive_and_wait();
      }
      turn_.arrive_and_wait();
    }
  }

  void renew() {  // barriers that threads dropped out of are not used again
    warps_.clear();
    for (size_t w = 0; w < members_.size() / WARP; ++w) warps_.push_back(std::make_unique<Warp>(WARP));
    of_block_ = std::make_unique<std::barrier<>>(std::ptrdiff_t(members_.size()));
  }

  std::barrier<> turn_, between_;
  int64_t blocks_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::unique_ptr<std::barrier<>> of_block_;
  std::vector<std::thread> members_;
};

// Calls `body` once for each thread of each block; the same host threads serve all blocks
inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  static std::map<int, Crew> crews;
  crews.try_emplace(threads, threads).first->second.run(blocks, body);
}

}  // namespace mf_emulator
