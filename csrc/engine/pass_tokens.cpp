// Tokens and both bridges.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/pass.h"

namespace mf::engine {
namespace {

constexpr float LN_2 = 0.69314718055994531f;

// [M][row], of which C channels, to [C][8]
void by_channel(const float* rows, int row, int C, int M, float* to) {
  for (int c = 0; c < C; ++c) {
    for (int m = 0; m < M; ++m) to[c * MAX_TOKENS + m] = rows[ptrdiff_t(m) * row + c];
  }
}

// Part `part` of a map's positions
Walk walk_of(const Map& map, int part, int parts, int* begin) {
  Walk walk;
  walk.block = map.block;
  walk.row = map.row;
  int first, last;
  if (map.row == ptrdiff_t(map.width) * BLOCK) {  // without border: one long row
    part_of(map.positions(), 16, part, parts, &first, &last);
    walk.rows = 1;
    walk.width = last - first;
    *begin = first;
    walk.x = map.data + ptrdiff_t(first) * BLOCK;
  } else {
    part_of(map.height, 1, part, parts, &first, &last);
    walk.rows = last - first;
    walk.width = map.width;
    *begin = first * map.width;
    walk.x = map.data + first * map.row;
  }
  return walk;
}

}  // namespace

// `rows` of each image at work; in and out belong to the first of all
void Pass::linear(const Linear& layer, const float* in, int in_row, int rows, float* out, int out_row, Act act,
                  const float* residual) {
  Products products = layer.products;
  products.offsets = space.in_order.data();
  products.rows = rows;
  const ptrdiff_t skipped = ptrdiff_t(first_) * rows;
  in += skipped * in_row;
  out += skipped * out_row;
  if (residual) residual += skipped * out_row;
  Epilogue e;
  e.bias = layer.bias;
  e.act = act;
  e.out = out;
  e.out_block = BLOCK;
  e.out_row = out_row;
  e.residual = residual;
  e.residual_block = BLOCK;
  e.residual_row = out_row;
  int first, last;
  worker.share(panel_count(products.vectors), 1, &first, &last);
  kernels.pointwise(products, e, in, in_row, 0, (last_ - first_) * rows, first, last);
  worker.sync();
}

void Pass::normalise(const Norm& norm) {
  const int M = config.num_tokens, D = config.token_dim;
  int first, last;
  worker.share((last_ - first_) * M, 1, &first, &last);
  kernels.layer_norm(space.tokens + ptrdiff_t(first_ * M + first) * D, norm.weight, norm.bias, D, last - first);
  worker.sync();
}

// tokens <- norm(tokens + project(gate * attention of the tokens over the map's positions))
void Pass::mobile_to_former(const MobileToFormer& part, size_t block, float* queries) {
  const int M = config.num_tokens, D = config.token_dim, C = part.channels;
  const int blocks = blocks_of(C), half_row = blocks * BLOCK, row = 2 * half_row;
  linear(part.query_and_gate, space.tokens, D, M, space.query_gate, row);
  one_by_one([&] {
    if (leader()) by_channel(space.query_gate + ptrdiff_t(image_) * M * row, row, C, M, queries);
    worker.sync();
    mark(".mobile_to_former, tokens");
    const Map& in = before(block);
    const int spans = spans_of(in.positions());
    int first, last;
    worker.share(spans, 1, &first, &last);
    for (int i = first; i < last; ++i) attend_span(in, i, spans, queries, C);
    worker.sync();
    mark(".mobile_to_former", 2.0 * C * M * in.positions());
    if (leader()) merge_spans(spans, C);
    worker.sync();
  });
  linear(part.project, space.gathered, half_row, M, space.tokens, D, Act::identity, space.tokens);
  normalise(part.norm);
  mark(".mobile_to_former, tokens", double(last_ - first_) * M * D * (part.query_and_gate.outputs + C));
}

// The tokens' attention over span `i` of a map
void Pass::attend_span(const Map& in, int i, int spans, const float* queries, int C) {
  const int M = config.num_tokens;
  const Span& span = space.spans[i];
  std::fill_n(span.reference, BLOCK, -INFINITY);
  std::fill_n(span.total, BLOCK, 0.0f);
  std::fill_n(span.sums, size_t(blocks_of(C)) * M * BLOCK, 0.0f);
  int begin;
  const Walk walk = walk_of(in, i, spans, &begin);
  float* scores = space.scores ? space.scores + ptrdiff_t(begin) * BLOCK : nullptr;
  kernels.mobile_to_former(walk, queries, C, M, span.reference, span.total, span.sums, scores);
}

// What the spans found, as one attention, through the gate
void Pass::merge_spans(int spans, int C) {
  const int M = config.num_tokens, half_row = blocks_of(C) * BLOCK;
  float* gathered = space.gathered + ptrdiff_t(image_) * M * half_row;
  float highest[BLOCK], total[BLOCK] = {};
  std::copy_n(space.spans[0].reference, BLOCK, highest);
  for (int i = 1; i < spans; ++i) {
    for (int lane = 0; lane < BLOCK; ++lane) highest[lane] = std::max(highest[lane], space.spans[i].reference[lane]);
  }
  std::fill_n(gathered, size_t(M) * half_row, 0.0f);
  for (int i = 0; i < spans; ++i) {
    const Span& span = space.spans[i];
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      for (int m = 0; m < M; ++m) {
        const int lane = h * MAX_TOKENS + m;
        const float share = spans == 1 ? 1.0f : std::exp2(span.reference[lane] - highest[lane]);
        total[lane] += span.total[lane] * share;
        const int from = h == 0 ? 0 : C / BRIDGE_HEADS, until = h == 0 ? C / BRIDGE_HEADS : C;
        for (int c = from; c < until; ++c) {
          const size_t at = (size_t(c / BLOCK) * M + m) * BLOCK + c % BLOCK;
          gathered[m * half_row + c] += span.sums[at] * share;
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    const float* gate = space.query_gate + (ptrdiff_t(image_) * M + m) * 2 * half_row + half_row;
    for (int c = 0; c < C; ++c) {
      const int lane = (c < C / BRIDGE_HEADS ? 0 : MAX_TOKENS) + m;
      const float opened = std::min(std::max(gate[c] + 3.0f, 0.0f), 6.0f) / 3.0f;  // 2 hsig
      gathered[m * half_row + c] *= opened / total[lane];
    }
  }
}

void Pass::token_side(size_t i) {
  const Block& block = weights.blocks[i];
  const TokenSide& side = block.tokens;
  const int M = config.num_tokens, D = config.token_dim;
  mobile_to_former(side.mobile_to_former, i, space.blocks[i].queries);
  dump_tokens(".mobile_to_former");

  linear(side.query, space.tokens, D, M, space.row, D);
  one_by_one([&] {
    int first, last;
    worker.share(M, 1, &first, &last);
    const ptrdiff_t at = ptrdiff_t(image_) * M * D, rows = at + first * D;
    kernels.former_attention(space.row + rows, space.tokens + at, space.wide + rows, D, M, last - first);
  });
  worker.sync();
  linear(side.project, space.wide, D, M, space.tokens, D, Act::identity, space.tokens);
  normalise(side.norm);
  linear(side.ffn_expand, space.tokens, D, M, space.wide, 2 * D, Act::gelu);
  linear(side.ffn_project, space.wide, 2 * D, M, space.tokens, D, Act::identity, space.tokens);
  normalise(side.ffn_norm);
  dump_tokens(".tokens");
  const int images = last_ - first_;
  mark(".former", images * (6.0 * M * D * D + 2.0 * M * M * D));

  const int N = block.config.out_channels, half_row = blocks_of(N) * BLOCK;
  linear(side.key_and_value, space.tokens, D, M, space.key_value, 2 * half_row);
  one_by_one([&] {
    if (!leader()) return;
    const BlockResult& result = space.results[image_][i];
    const float* key_value = space.key_value + ptrdiff_t(image_) * M * 2 * half_row;
    by_channel(key_value, 2 * half_row, N, M, result.keys);
    for (int m = 0; m < M; ++m) {
      const float* value = key_value + m * 2 * half_row + half_row;
      for (int c = 0; c < N; ++c) result.values[(size_t(c / BLOCK) * M + m) * BLOCK + c % BLOCK] = value[c];
    }
  });
  const int rows = spatial() ? M : 1;  // slopes come from the first token, or from all of them
  const int reduced_row = 2 * blocks_of(side.reduced) * BLOCK;
  linear(side.reduce, space.tokens, spatial() ? D : M * D, rows, space.reduced, reduced_row, Act::relu);
  const bool down = block.config.kind == Kind::down;
  slopes(side, 0, reduced_row, down ? ".down_relu" : ".expand_relu", block.depthwise.places);
  slopes(side, 1, reduced_row, down ? ".expand_relu" : ".depthwise_relu",
         down ? block.second.places : block.depthwise.places);
  mark(".slopes, key, value",
       images * (double(M) * D * 2 * N +
                 double(rows) * side.reduced * (2.0 * D + side.expand[0].outputs + side.expand[1].outputs)));
}

// a1 = 2 theta1 and a2 = 2 theta2 - 1, in the order of the map they act on
void Pass::slopes(const TokenSide& side, int which, int reduced_row, const char* stage, const Places& order) {
  const Linear& layer = side.expand[which];
  const int rows = spatial() ? config.num_tokens : 1, places = layer.outputs / 2;
  float* to = space.slopes[which];
  linear(layer, space.reduced + which * reduced_row / 2, reduced_row, rows, to, 2 * places, Act::hard_sigmoid);
  one_by_one([&] { dump_slopes(stage, to + ptrdiff_t(image_) * rows * 2 * places, rows, order); });
  to += ptrdiff_t(first_) * rows * 2 * places;
  int first, last;
  worker.share((last_ - first_) * rows * 2 * places, BLOCK, &first, &last);
  for (int i = first; i < last; ++i) to[i] = 2.0f * to[i] - (i % (2 * places) < places ? 0.0f : 1.0f);
  worker.sync();
}

// What each position takes of each token: softmax over tokens of the bridge's scores, averaged over heads and, where
// the block halves the map, over the window of an adaptive average pooling
void Pass::mix_tokens(const Map& in, int height, int width) {
  const int M = config.num_tokens;
  int first, last;
  worker.share(height, 1, &first, &last);
  for (int y = first; y < last; ++y) {
    const int top = y * in.height / height, bottom = ((y + 1) * in.height + height - 1) / height;
    for (int x = 0; x < width; ++x) {
      const int left = x * in.width / width, right = ((x + 1) * in.width + width - 1) / width;
      float* mix = space.mix + (ptrdiff_t(y) * width + x) * MAX_TOKENS;
      float maximum = -INFINITY, total = 0;
      for (int m = 0; m < M; ++m) {
        float sum = 0;
        for (int i = top; i < bottom; ++i) {
          for (int j = left; j < right; ++j) {
            const float* score = space.scores + (ptrdiff_t(i) * in.width + j) * BLOCK;
            sum += score[m] + score[MAX_TOKENS + m];
          }
        }
        mix[m] = sum * LN_2 / float(BRIDGE_HEADS * (bottom - top) * (right - left));
        maximum = std::max(maximum, mix[m]);
      }
      for (int m = 0; m < M; ++m) total += mix[m] = std::exp(mix[m] - maximum);
      for (int m = 0; m < M; ++m) mix[m] /= total;
    }
  }
  worker.sync();
}

// map <- map + attention of its positions over the tokens
void Pass::former_to_mobile(const BlockResult& result) {
  const int N = result.out.channels, M = config.num_tokens;
  int begin;
  const Walk walk = walk_of(result.out, worker.rank, worker.size, &begin);
  Bfloat16Map bf16 = result.out.bf16;
  if (bf16.data) bf16.data += ptrdiff_t(begin) * kernels.bf16_run;
  kernels.former_to_mobile(walk, result.keys, result.values, N, M, const_cast<float*>(walk.x), bf16);
  worker.sync();
  mark(".former_to_mobile", 2.0 * N * M * result.out.positions());
}

}  // namespace mf::engine
