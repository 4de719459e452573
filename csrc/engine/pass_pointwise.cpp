// Pointwise layers of an image.
#include <algorithm>

#include "engine/pass.h"

namespace mf::engine {
// The map in `flat` that `reader` takes as bfloat16, or a null one
Bfloat16Map Pass::flat_bf16(const Pointwise& reader, const DepthwiseLayer& made, int positions) const {
  if (!reader.reads_bf16()) return {};
  uint16_t* data = reinterpret_cast<uint16_t*>(space.flat);
  return bf16_map(data, reader.parts(), int(made.in_block.size()), positions, kernels);
}

// A pointwise layer from what `made` left in `flat` to positions [begin, end) of a map
void Pass::pointwise(const Pointwise& layer, const DepthwiseLayer& made, const Offsets& offsets, Map& out,
                     const Map* residual, bool also_bf16, int begin, int end, bool by_panels) {
  const ptrdiff_t part_size = flat_bf16(layer, made, out.positions()).part_size;
  if (layer.groups.size() > 1) return grouped(layer, part_size, offsets, out, residual, also_bf16, begin, end);
  Products products = layer.groups[0].products;
  products.offsets = offsets[0].data();
  products.part_size = part_size;
  products.prefetch = member.prefetch.lines();
  Epilogue e;
  e.bias = layer.bias;
  e.width = out.width;
  e.out = out.data;
  e.out_block = out.block;
  e.out_row = out.row;
  if (residual) {
    e.residual = residual->data;
    e.residual_block = residual->block;
    e.residual_row = residual->row;
  }
  if (also_bf16) e.bf16 = out.bf16;
  int first = 0, last = panel_count(products.vectors);
  if (by_panels) worker.share(last, 1, &first, &last);
  const int stride = layer.reads_bf16() ? kernels.bf16_run : BLOCK;
  kernels.pointwise(products, e, space.flat, stride, begin, end, first, last);
}

// Group by group for a few positions, and then their channels in the order of the map
void Pass::grouped(const Pointwise& layer, ptrdiff_t part_size, const Offsets& offsets, Map& out, const Map* residual,
                   bool also_bf16, int begin, int end) {
  constexpr int chunk = GROUPED_CHUNK;
  const int each = layer.outputs / int(layer.groups.size());
  float* made = space.scratch[worker.rank].grouped;
  float ordered[MAX_GROUPED + 4 * BLOCK] = {};
  const int stride = layer.reads_bf16() ? kernels.bf16_run : BLOCK;
  const size_t element = layer.reads_bf16() ? sizeof(uint16_t) : sizeof(float);
  for (int at = begin; at < end; at += chunk) {
    const int count = std::min(chunk, end - at);
    for (size_t g = 0; g < layer.groups.size(); ++g) {
      Products products = layer.groups[g].products;
      products.offsets = offsets[g].data();
      products.part_size = part_size;
      products.prefetch = member.prefetch.lines();
      Epilogue e;
      e.bias = layer.bias + ptrdiff_t(g) * layer.group_blocks * BLOCK;
      e.width = count;
      e.out = made + ptrdiff_t(g) * layer.group_blocks * chunk * BLOCK;
      e.out_block = ptrdiff_t(chunk) * BLOCK;
      const char* from = reinterpret_cast<const char*>(space.flat) + size_t(at) * stride * element;
      kernels.pointwise(products, e, from, stride, 0, count, 0, panel_count(products.vectors));
    }
    int y = at / out.width, x = at % out.width;
    for (int p = 0; p < count; ++p) {
      float* to = out.data + y * out.row + x * BLOCK;
      const float* add = residual ? residual->data + y * residual->row + x * BLOCK : nullptr;
      // Whole blocks are moved: what is too much of a group gives way to the next one, and is zero at the end
      for (int b = 0; b < layer.group_blocks; ++b) {
        const float* from = made + (ptrdiff_t(b) * chunk + p) * BLOCK;
        const ptrdiff_t group = ptrdiff_t(layer.group_blocks) * chunk * BLOCK;
        float* to_all = ordered + 4 * b * BLOCK;
        for (int n = 0; layer.shuffled && n < BLOCK; ++n) {
          for (int g = 0; g < 4; ++g) to_all[4 * n + g] = from[g * group + n];
        }
      }
      for (int g = 0; !layer.shuffled && g < 4; ++g) {
        for (int b = 0; b < layer.group_blocks; ++b) {
          const float* from = made + (ptrdiff_t(g * layer.group_blocks + b) * chunk + p) * BLOCK;
          std::copy_n(from, BLOCK, ordered + g * each + b * BLOCK);
        }
      }
      for (int b = 0; b < out.blocks; ++b) {
        for (int i = 0; i < BLOCK; ++i)
          to[b * out.block + i] = ordered[b * BLOCK + i] + (add ? add[b * residual->block + i] : 0.0f);
      }
      if (++x == out.width) x = 0, ++y;
    }
  }
  if (!also_bf16) return;
  Bfloat16Map to = out.bf16;
  to.data += ptrdiff_t(begin) * kernels.bf16_run;
  for (int b = 0; b < out.blocks; ++b) {
    kernels.to_bf16_map(out.data + b * out.block + ptrdiff_t(begin) * BLOCK, end - begin, to, b);
  }
}

}  // namespace mf::engine
