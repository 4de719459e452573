// How often each kernel of a library ran. A kernel's file defines its counter, which is the one place that bears the
// kernel's name; whoever reports finds them all, since each joins the list when the library is loaded.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mf {

class KernelCounter {
 public:
  static constexpr int WAYS = 3;  // of one kernel that are counted apart: its instruction sets on the CPU

  const char* const name;

  explicit KernelCounter(const char* name) : name(name), next_(last_) { last_ = this; }
  KernelCounter(const KernelCounter&) = delete;
  KernelCounter& operator=(const KernelCounter&) = delete;

  void add(int way = 0) { calls_[way].fetch_add(1, std::memory_order_relaxed); }
  uint64_t calls(int way = 0) const { return calls_[way].load(std::memory_order_relaxed); }

  // In the order of their names
  static std::vector<const KernelCounter*> all() {
    std::vector<const KernelCounter*> found;
    for (const KernelCounter* counter = last_; counter; counter = counter->next_) found.push_back(counter);
    std::sort(found.begin(), found.end(), [](auto* a, auto* b) { return std::strcmp(a->name, b->name) < 0; });
    return found;
  }

 private:
  static inline KernelCounter* last_ = nullptr;  // null before any constructor runs
  const KernelCounter* next_;
  std::atomic<uint64_t> calls_[WAYS] = {};
};

}  // namespace mf
