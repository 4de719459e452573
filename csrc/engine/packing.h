// Arrays of a folded network taken by name, and weights laid out as the kernels read them.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <stdexcept>

#include "engine/weights.h"

namespace mf::engine {

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline std::string text(const std::vector<long>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

// Reads arrays by name and shape, and knows at the end whether one was left over. Without arrays it notes what is asked
// for and gives zeros.
class Reader {
 public:
  explicit Reader(const Arrays* arrays) : arrays_(arrays) {}

  const float* operator()(const std::string& name, std::vector<long> shape) {
    if (!arrays_) {
      size_t size = 1;
      for (long side : shape) size *= size_t(side);
      asked_[name] = std::move(shape);
      return zeros_.emplace_back(size).data();
    }
    const auto found = arrays_->find(name);
    if (found == arrays_->end()) throw std::invalid_argument("arrays: " + name + " is missing");
    if (found->second.shape != shape) {
      throw std::invalid_argument("arrays: " + name + ": expected shape " + text(shape) + ", got " +
                                  text(found->second.shape));
    }
    used_.insert(name);
    return found->second.data;
  }

  void finish() const {
    if (!arrays_) return;
    for (const auto& [name, array] : *arrays_) {
      if (!used_.count(name)) throw std::invalid_argument("arrays: " + name + " is not part of this network");
    }
  }

  const Shapes& asked() const { return asked_; }

 private:
  const Arrays* arrays_;
  std::set<std::string> used_;
  Shapes asked_;
  std::deque<std::vector<float>> zeros_;
};

// Weight of output n and input k
using Element = std::function<float(int n, int k)>;

class Packer {
 public:
  Packer(Arena& arena, const Kernels& kernels) : arena_(arena), lanes_(kernels.lanes) {}

  // N outputs of `depth` inputs, or of `depth` pairs of them where `format` is bf16
  Products products(Format format, int N, int depth, const Element& element) {
    Products p;
    p.format = format;
    p.depth = depth;
    p.half_tail = N % BLOCK > 0 && N % BLOCK <= BLOCK / 2;
    p.vectors = blocks_of(N) * BLOCK / lanes_;  // whole blocks, so that gaps are written as zeros every time
    const size_t count = size_t(p.vectors) * lanes_ * depth;
    float* floats = format == Format::f32 ? arena_.take(count) : nullptr;
    uint16_t* halves = floats ? nullptr : arena_.take<uint16_t>(format == Format::bf16 ? 2 * count : count);
    p.weight = floats ? static_cast<const void*>(floats) : halves;
    size_t at = 0;
    for (int i = 0; i < panel_count(p.vectors); ++i) {
      const int first = first_vector(p.vectors, i) * lanes_, width = panel_vectors(p.vectors, i) * lanes_;
      for (int k = 0; k < depth; ++k) {
        for (int n = first; n < first + width; ++n) {
          if (format == Format::bf16) {
            for (int j = 0; j < 2; ++j) halves[at++] = n < N ? to_bf16(element(n, 2 * k + j)) : 0;
          } else if (format == Format::bf16_weight) {
            halves[at++] = n < N ? to_bf16(element(n, k)) : 0;
          } else {
            floats[at++] = n < N ? element(n, k) : 0.0f;
          }
        }
      }
    }
    return p;
  }

  int lanes() const { return lanes_; }

  size_t taken() const { return arena_.taken(); }

  const float* vector(int N, const std::function<float(int)>& element) {
    float* values = arena_.take(size_t(blocks_of(N)) * BLOCK);
    for (int n = 0; n < N; ++n) values[n] = element(n);
    return values;
  }

 private:
  Arena& arena_;
  int lanes_;
};

}  // namespace mf::engine
