// Threads that work on one image together. They spin at the barriers inside an image; after one they spin for the time
// that the next of a series takes to come, and then sleep.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mf::engine {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Turns of relax(): some ten microseconds to a few hundred, by the processor
constexpr int SPINS = 4000;

// Part `part` of `parts` about equal ones of [0, count), in multiples of `grain`
inline void part_of(int count, int grain, int part, int parts, int* begin, int* end) {
  const int grains = (count + grain - 1) / grain;
  *begin = std::min(count, int(long(grains) * part / parts) * grain);
  *end = std::min(count, int(long(grains) * (part + 1) / parts) * grain);
}

// One member of a team: its rank, and where it waits for the others.
class Worker {
 public:
  const int rank, size;

  Worker(int rank, int size, std::atomic<unsigned>* arrived, std::atomic<unsigned>* round)
      : rank(rank), size(size), arrived_(arrived), round_(round) {}

  // Returns when every member is here; what they wrote before is then seen by all
  void sync() {
    if (size == 1) return;
    const unsigned round = round_->load(std::memory_order_relaxed);
    if (arrived_->fetch_add(1, std::memory_order_acq_rel) + 1 == unsigned(size)) {
      arrived_->store(0, std::memory_order_relaxed);
      round_->store(round + 1, std::memory_order_release);
      round_->notify_all();
      return;
    }
    // Members are at most microseconds apart, unless one has lost its processor: then this one is better given up too
    for (int spins = 0; spins < SPINS; ++spins) {
      if (round_->load(std::memory_order_acquire) != round) return;
      relax();
    }
    while (round_->load(std::memory_order_acquire) == round) round_->wait(round, std::memory_order_acquire);
  }

  // This member's share of [0, count), in multiples of `grain`
  void share(int count, int grain, int* begin, int* end) const { part_of(count, grain, rank, size, begin, end); }

 private:
  std::atomic<unsigned>* arrived_;
  std::atomic<unsigned>* round_;
};

using Body = std::function<void(Worker&)>;

class Team {
 public:
  // Throws std::runtime_error where the system refuses a thread; those that it gave are gone then.
  explicit Team(int size) : size_(size) {
    threads_.reserve(size_t(size - 1));
    for (int rank = 1; rank < size; ++rank) {
      try {
        threads_.emplace_back([this, rank] { serve(rank); });
      } catch (const std::system_error& error) {
        leave();
        throw std::runtime_error("threads: the system gave " + std::to_string(rank) + " of " + std::to_string(size) +
                                 ": " + error.what());
      }
    }
  }

  ~Team() { leave(); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // False in a process that was forked from the team's own: its threads have stayed behind
  bool here() const { return process_ == getpid(); }

  // body(worker) on every member, the caller being rank 0. One call at a time. What rank 0 throws is thrown on; the
  // others must not throw.
  void run(const Body& body) {
    if (size_ > 1) {
      {
        std::lock_guard lock(mutex_);
        body_ = &body;
        ++job_;
        left_ = size_ - 1;
      }
      wake_.notify_all();
    }
    Worker worker(0, size_, &arrived_, &round_);
    body(worker);
    if (size_ > 1) {
      for (int spins = 0; spins < SPINS && left_ > 0; ++spins) relax();
      std::unique_lock lock(mutex_);
      done_.wait(lock, [this] { return left_ == 0; });
    }
  }

 private:
  void leave() {
    {
      std::lock_guard lock(mutex_);
      leaving_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) here() ? thread.join() : thread.detach();
  }

  void serve(int rank) {
    unsigned seen = 0;
    for (;;) {
      const Body* body;
      for (int spins = 0; spins < SPINS && job_ == seen && !leaving_; ++spins) relax();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return leaving_ || job_ != seen; });
        if (leaving_) return;
        seen = job_;
        body = body_;
      }
      Worker worker(rank, size_, &arrived_, &round_);
      (*body)(worker);
      std::lock_guard lock(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  const int size_;
  const pid_t process_ = getpid();
  std::atomic<unsigned> arrived_{0}, round_{0};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Body* body_ = nullptr;
  // changed under the lock, so that who is about to sleep hears of it; read without it by who spins
  std::atomic<unsigned> job_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> leaving_{false};
  std::vector<std::thread> threads_;
};

}  // namespace mf::engine
