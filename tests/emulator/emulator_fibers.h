// The engine with one fiber for each CUDA thread, all on one host thread: a barrier costs a jump, not a system call.
// Threads that wait for each other at different barriers end the process with a message; on the device they would hang.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>
#include <ucontext.h>

namespace mf_emulator {

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  bool arrive() {  // whether the last one has come
    if (++arrived < expected) return false;
    arrived = 0, ++generation;
    return true;
  }
  void drop() {
    if (--expected == arrived && arrived > 0) arrived = 0, ++generation;
  }
};

struct Warp {
  Barrier barrier;
  uint32_t exchanged[WARP];
};

constexpr size_t STACK = 128 * 1024;

struct Fiber {
  Index index;
  Warp* warp = nullptr;
  Barrier* waits_at = nullptr;
  unsigned waits_since = 0;
  bool done = false;
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool ready() const { return !done && (waits_at == nullptr || waits_at->generation != waits_since); }
};

struct Block {
  Index index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  int current = 0, left = 0;
  const std::function<void()>* body = nullptr;
  jmp_buf finished;
};

inline Block* block = nullptr;

inline const Index& thread_index() { return block->fibers[block->current].index; }
inline const Index& block_index() { return block->index; }
inline uint32_t* exchange() { return block->fibers[block->current].warp->exchanged; }

inline void jump_to_next() {
  const int count = int(block->fibers.size());
  for (int step = 1; step <= count; ++step) {
    const int next = (block->current + step) % count;
    if (!block->fibers[next].ready()) continue;
    block->current = next;
    block->fibers[next].waits_at = nullptr;
    _longjmp(block->fibers[next].state, 1);
  }
  std::fprintf(stderr, "cuda_emulator: the threads of block %u wait at different barriers\n", block->index.x);
  std::abort();
}

inline void wait_at(Barrier& barrier) {
  Fiber& fiber = block->fibers[block->current];
  const unsigned generation = barrier.generation;
  if (barrier.arrive()) return;
  fiber.waits_at = &barrier, fiber.waits_since = generation;
  if (_setjmp(fiber.state) == 0) jump_to_next();
}

inline void block_barrier() { wait_at(block->barrier); }
inline void warp_barrier() { wait_at(block->fibers[block->current].warp->barrier); }

inline void fiber_main() {
  for (;;) {  // once for each block
    (*block->body)();
    Fiber& fiber = block->fibers[block->current];
    fiber.warp->barrier.drop(), block->barrier.drop();
    fiber.done = true;
    if (_setjmp(fiber.state) == 0) {
      if (--block->left == 0) _longjmp(block->finished, 1);
      jump_to_next();
    }
  }
}

// Calls `body` once for each thread of each block
inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  static Block kept;  // stacks are made once
  static ucontext_t home, entry;
  block = &kept;
  kept.body = &body;
  if (int(kept.fibers.size()) != threads) {
    kept.fibers = std::vector<Fiber>(threads);
    kept.warps = std::vector<Warp>(threads / WARP);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = kept.fibers[t];
      fiber.index.x = unsigned(t), fiber.warp = &kept.warps[t / WARP];
      getcontext(&entry);
      entry.uc_stack.ss_sp = fiber.stack.get(), entry.uc_stack.ss_size = STACK, entry.uc_link = nullptr;
      makecontext(
          &entry,
          [] {
            static ucontext_t unused;
            if (_setjmp(block->fibers[block->current].state) == 0) swapcontext(&unused, &home);
            fiber_main();
          },
          0);
      kept.current = t;
      swapcontext(&home, &entry);
    }
  }
  for (volatile int64_t b = 0; b < blocks; b = b + 1) {  // volatile: lives across _setjmp
    kept.index.x = unsigned(b), kept.left = threads;
    kept.barrier = {threads};
    for (Warp& warp : kept.warps) warp.barrier = {WARP};
    for (Fiber& fiber : kept.fibers) fiber.done = false, fiber.waits_at = nullptr;
    if (_setjmp(kept.finished) == 0) {
      kept.current = 0;
      _longjmp(kept.fibers[0].state, 1);
    }
  }
}

}  // namespace mf_emulator
