// For whoever looks inside: stages and times.
#include <algorithm>
#include <cstring>

#include "engine/pass.h"

namespace mf::engine {

// A stage of the block at work begins with a dot, or is empty for the block itself
std::string Pass::full(const char* stage) const {
  const bool of_block = block_ >= 0 && (*stage == '.' || *stage == 0);
  return (of_block ? "blocks." + std::to_string(block_) : "") + (block_ < 0 && *stage == '.' ? stage + 1 : stage);
}

void Pass::dump(const char* stage, const Map& map) {
  if (!extras.stages) return;
  Places places(size_t(map.blocks) * BLOCK, -1);
  for (int c = 0; c < map.channels; ++c) places[c] = c;
  for (int b = 0; b < map.blocks; ++b) {
    dump_block(stage, map.data + b * map.block, map.row, map.height, map.width, places, b);
  }
}

void Pass::dump_block(const char* stage, const float* data, ptrdiff_t row, int height, int width, const Places& places,
                      int block) {
  if (!extras.stages) return;
  const long channels = std::count_if(places.begin(), places.end(), [](int place) { return place >= 0; });
  float* to = extras.stages->place(full(stage), {channels, height, width}, first_image + image_);
  for (int lane = 0; lane < BLOCK; ++lane) {
    const int channel = places[block * BLOCK + lane];
    if (channel < 0) continue;
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        to[(ptrdiff_t(channel) * height + y) * width + x] = data[y * row + x * BLOCK + lane];
      }
    }
  }
}

void Pass::dump_flat(const char* stage, const DepthwiseLayer& layer, int height, int width, const Pointwise& reader) {
  if (!extras.stages) return;
  const int positions = height * width, run = kernels.bf16_run;
  const ptrdiff_t plane = ptrdiff_t(positions) * BLOCK;
  const Bfloat16Map bf16 = flat_bf16(reader, layer, positions);
  std::vector<float> sums(plane);
  for (int b = 0; b < int(layer.in_block.size()); ++b) {
    const float* data = space.flat + b * plane;
    if (bf16.data) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      const uint16_t* from = bf16.data + b * BLOCK / run * bf16.run + b * BLOCK % run;
      for (int i = 0; i < bf16.parts; ++i, from += bf16.part_size) {
        for (ptrdiff_t at = 0; at < plane; ++at) {
          const uint32_t bits = uint32_t(from[at / BLOCK * run + at % BLOCK]) << 16;
          float value;
          std::memcpy(&value, &bits, sizeof(value));
          sums[at] += value;
        }
      }
      data = sums.data();
    }
    dump_block(stage, data, ptrdiff_t(width) * BLOCK, height, width, layer.places, b);
  }
}

// theta [rows][2][places] before it becomes slopes
void Pass::dump_slopes(const char* stage, const float* theta, int rows, const Places& order) {
  if (!extras.stages) return;
  const long K = std::count_if(order.begin(), order.end(), [](int place) { return place >= 0; });
  std::vector<long> shape{2 * K};
  if (spatial()) shape.insert(shape.begin(), rows);
  float* to = extras.stages->place(full(stage), shape, first_image + image_);
  for (int line = 0; line < 2 * rows; ++line) {
    for (size_t i = 0; i < order.size(); ++i) {
      if (order[i] >= 0) to[line * K + order[i]] = theta[line * order.size() + i];
    }
  }
}

void Pass::dump_tokens(const char* stage) {
  if (!extras.stages) return;
  const int M = config.num_tokens, D = config.token_dim;
  one_by_one([&] {
    std::copy_n(space.tokens + ptrdiff_t(image_) * M * D, size_t(M) * D,
                extras.stages->place(full(stage), {M, D}, first_image + image_));
  });
}

// Time since the last mark goes to this stage
void Pass::mark(const char* stage, double multiply_adds) {
  if (member.timer.wanted()) member.timer.mark(full(stage), multiply_adds);
}

}  // namespace mf::engine
