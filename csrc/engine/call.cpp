#include "engine/call.h"

#include <utility>

namespace mf::engine {

float* Stages::place(const std::string& name, std::vector<long> shape, int image) {
  size_t size = 1;
  for (long side : shape) size *= size_t(side);
  auto [at, is_new] = named.try_emplace(name);
  if (is_new) {
    order.push_back(name);
    at->second = {std::move(shape), std::vector<float>(size * batch)};
  }
  return at->second.values.data() + size * image;
}

Profile::Row& Profile::operator[](const std::string& name) {
  const auto [at, is_new] = index.try_emplace(name, rows.size());
  if (is_new) rows.push_back({name});
  return rows[at->second];
}

void Timer::mark(const std::string& stage, double multiply_adds) {
  const auto now = std::chrono::steady_clock::now();
  Profile::Row& row = (*profile_)[stage];
  row.seconds += std::chrono::duration<double>(now - marked_).count();
  row.multiply_adds += multiply_adds;
  marked_ = std::chrono::steady_clock::now();
}

}  // namespace mf::engine
