// Arrays of a folded network taken by name, and weights laid out as the kernels read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <stdexcept>

#include "common/numbers.h"
#include "engine/storage.h"

namespace mf::engine {

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
      shapes_[name] = std::move(shape);
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

  const Shapes& shapes() const { return shapes_; }

 private:
  const Arrays* arrays_;
  std::set<std::string> used_;
  Shapes shapes_;
  std::deque<std::vector<float>> zeros_;
};

// Weight of output n and input k
using Element = std::function<float(int n, int k)>;

class Packer {
 public:
  Packer(Arena& arena, const Kernels& kernels) : arena_(arena), lanes_(kernels.lanes), bf16_step_(kernels.bf16_step) {}

  // N outputs of `depth` inputs, or of `depth` steps of them where `format` is bf16
  Products products(Format format, int N, int depth, const Element& element, int parts = 1) {
    Products p;
    p.format = format;
    p.depth = depth;
    p.parts = parts;
    p.half_tail = N % BLOCK > 0 && N % BLOCK <= BLOCK / 2;
    p.vectors = blocks_of(N) * BLOCK / lanes_;  // whole blocks, so that gaps are written as zeros every time
    switch (format) {
      case Format::f32: floats(p, N, element); break;
      case Format::bf16: bf16_step_ == 2 ? pairs(p, N, element) : tiles(p, N, element); break;
      case Format::i16_weight: integers(p, N, element); break;
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
  // visit(n, k) for every weight, in the order of storage where nothing lies between
  template <class Visit>
  void in_panels(const Products& p, const Visit& visit) {
    for (int i = 0; i < panel_count(p.vectors); ++i) {
      const int first = first_vector(p.vectors, i) * lanes_, width = panel_vectors(p.vectors, i) * lanes_;
      for (int k = 0; k < p.depth; ++k) {
        for (int n = first; n < first + width; ++n) visit(n, k);
      }
    }
  }

  size_t count(const Products& p) const { return size_t(p.vectors) * lanes_ * p.depth; }

  void floats(Products& p, int N, const Element& element) {
    float* to = arena_.take(count(p));
    p.weight = to;
    in_panels(p, [&](int n, int k) { *to++ = n < N ? element(n, k) : 0.0f; });
  }

  void pairs(Products& p, int N, const Element& element) {
    uint16_t* to = arena_.take<uint16_t>(2 * count(p));
    p.weight = to;
    in_panels(p, [&](int n, int k) {
      for (int j = 0; j < 2; ++j) *to++ = n < N ? to_bf16(element(n, 2 * k + j)) : 0;
    });
  }

  // Each output in steps of a 32767th of its largest weight: as short as bfloat16, and a hundred times as close
  void integers(Products& p, int N, const Element& element) {
    int16_t* to = arena_.take<int16_t>(count(p));
    float* scale = arena_.take(size_t(p.vectors) * lanes_);
    p.weight = to;
    p.scale = scale;
    for (int n = 0; n < N; ++n) {
      float largest = 0;
      for (int k = 0; k < p.depth; ++k) largest = std::max(largest, std::fabs(element(n, k)));
      scale[n] = largest / 32767;
    }
    in_panels(p, [&](int n, int k) {
      const float steps = n < N && scale[n] > 0 ? element(n, k) / scale[n] : 0;
      *to++ = int16_t(std::lrint(std::clamp(steps, -32767.0f, 32767.0f)));
    });
  }

  // Of 16 outputs a tile: rows of two inputs each; the high parts of 32 inputs, then the low ones
  void tiles(Products& p, int N, const Element& element) {
    uint16_t* to = arena_.take<uint16_t>(count(p) * bf16_step_ * p.parts);
    p.weight = to;
    for (int i = 0; i < panel_count(p.vectors); ++i) {
      const int first = first_vector(p.vectors, i), last = first + panel_vectors(p.vectors, i);
      for (int k = 0; k < p.depth; ++k) {
        for (int part = 0; part < p.parts; ++part) {
          for (int v = first; v < last; ++v) {
            for (int row = 0; row < bf16_step_; row += 2) {
              for (int n = v * lanes_; n < (v + 1) * lanes_; ++n) {
                for (int j = row; j < row + 2; ++j) {
                  *to++ = n < N ? part_of_float(element(n, bf16_step_ * k + j), part) : 0;
                }
              }
            }
          }
        }
      }
    }
  }

  static uint16_t part_of_float(float value, int part) {
    for (; part > 0; --part) value -= from_bf16(to_bf16(value));
    return to_bf16(value);
  }

  Arena& arena_;
  int lanes_, bf16_step_;
};

}  // namespace mf::engine
