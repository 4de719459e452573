#include "engine/pass.h"

#include <algorithm>

namespace mf::engine {

void Pass::run(const Images& images) {
  const size_t together = count == 1 ? weights.blocks.size() : space.first_together;
  for (int i = 0; i < count; ++i) {
    first_ = image_ = i;
    last_ = i + 1;
    begin(images);
    for (size_t b = 0; b < together; ++b) block(b, images);
  }
  first_ = image_ = 0;
  for (size_t b = together; b < weights.blocks.size(); ++b) block(b, images);
  block_ = -1;
  member.prefetch.move_to(weights.bridge_at);
  mobile_to_former(weights.bridge, weights.blocks.size(), space.bridge_queries);
  dump_tokens("tokens");
  member.prefetch.move_to(weights.end);
  if (!extras.tokens || !leader()) return;
  const size_t size = size_t(count) * config.num_tokens * config.token_dim;
  std::copy_n(space.tokens, size, extras.tokens + size_t(first_image) * config.num_tokens * config.token_dim);
}

// Where the first block cannot make it row by row, the first map; and the tokens that every image begins with
void Pass::begin(const Images& images) {
  const bool alone = worker.size == 1 && weights.blocks[0].config.kind == Kind::lite;
  if (!alone) {  // members need rows of each other
    int first, last;
    worker.share(space.stem.height, 1, &first, &last);
    stem(images, first, last);
  }
  if (leader()) {
    const size_t size = size_t(config.num_tokens) * config.token_dim;
    std::copy_n(weights.tokens, size, space.tokens + image_ * size);
  }
  worker.sync();
}

// Block `i` of all images at work
void Pass::block(size_t i, const Images& images) {
  const Block& block = weights.blocks[i];
  block_ = int(i);
  member.prefetch.move_to(block.weights_at);
  if (block.config.kind != Kind::lite) {
    token_side(i);
    member.prefetch.move_to(block.maps_at);
  }
  one_by_one([&] {
    switch (block.config.kind) {
      case Kind::lite: lite(i, images); break;
      case Kind::same: same(i); break;
      case Kind::down: down(i); break;
    }
    if (i == 0) dump("stem", space.stem);
    dump("", space.results[image_][i].out);
    hand_out(i);
  });
}

// The map that the image at work leaves block `i` with, where somebody asked for it
void Pass::hand_out(size_t i) {
  if (extras.maps.empty() || !leader()) return;
  for (size_t level = 0; level < shapes.size(); ++level) {
    if (shapes[level].block != int(i)) continue;
    const Map& map = space.results[image_][i].out;
    float* to = extras.maps[level] + size_t(first_image + image_) * map.channels * map.positions();
    for (int c = 0; c < map.channels; ++c) {
      for (int y = 0; y < map.height; ++y) {
        const float* from = map.data + c / BLOCK * map.block + y * map.row + c % BLOCK;
        for (int x = 0; x < map.width; ++x) *to++ = from[x * BLOCK];
      }
    }
  }
}

// What block `i` reads of the image at work
const Map& Pass::before(size_t i) const { return i == 0 ? space.stem : space.results[image_][i - 1].out; }

// Slopes of a dynamic ReLU of the image at work, or of all its tokens
const float* Pass::slopes_at(int which, const DepthwiseLayer& layer) const {
  const int rows = spatial() ? config.num_tokens : 1;
  return space.slopes[which] + ptrdiff_t(image_) * rows * 2 * ptrdiff_t(layer.places.size());
}

// Row `row` of the image to where the stem reads it; zeros above and below the image
void Pass::image_row(const Images& images, int row) {
  const int W = images.width, channels = images.channels;
  Scratch& own = space.scratch[worker.rank];
  float* to = own.image_rows + ptrdiff_t((row + 3) % 3) * channels * 2 * space.image_half;
  for (int c = 0; c < channels; ++c, to += 2 * space.image_half) {
    if (row < 0 || row >= images.height) {
      std::fill_n(to, 2 * space.image_half, 0.0f);
      continue;
    }
    const float* from = own.image_row;
    if (images.floats) {
      from = images.floats + ((size_t(first_image + image_) * channels + c) * images.height + row) * W;
    } else {
      const uint8_t* bytes = images.bytes + (size_t(first_image + image_) * images.height + row) * W * channels + c;
      const float scale = 1.0f / (255.0f * config.std[c]);
      const float shift = config.mean[c] / config.std[c];
      for (int x = 0; x < W; ++x) own.image_row[x] = float(bytes[x * channels]) * scale - shift;
    }
    kernels.split_row(from, W, to, to + space.image_half);
  }
}

// Rows [first, last) of the first map
void Pass::stem(const Images& images, int first, int last) {
  Stem s = weights.stem;
  const Map& out = space.stem;
  s.half = space.image_half;
  const ptrdiff_t slot = ptrdiff_t(s.channels) * 2 * s.half;
  for (int y = first; y < last; ++y) {
    for (int r = y == first ? -1 : 0; r < 2; ++r) image_row(images, 2 * y + r);
    for (int r = 0; r < 3; ++r) s.rows[r] = space.scratch[worker.rank].image_rows + (2 * y + r + 2) % 3 * slot;
    kernels.stem(s, out.width, out.data + y * out.row, out.block);
  }
  mark("stem", 9.0 * s.channels * s.outputs * out.width * (last - first));
}

}  // namespace mf::engine
