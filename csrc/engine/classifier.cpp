#include "engine/classifier.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace mf::engine {

Classifier::Classifier(const Config& config, LayerBuilder& build)
    : hidden_features_(config.hidden_features), classes_(config.num_classes) {
  const int C = config.blocks.back().out_channels, groups = config.groups;
  if (6 * C / groups % BLOCK != 0) {
    throw std::invalid_argument("config: groups: the classifier's " + std::to_string(groups) +
                                " groups do not fill whole blocks of 16 channels");
  }
  if (hidden_features_ % BLOCK != 0) {
    throw std::invalid_argument("config: hidden_features: expected a multiple of 16, got " +
                                std::to_string(hidden_features_));
  }
  int stride = 2;
  for (const BlockConfig& block : config.blocks) stride *= block.stride;
  // channel i of the shuffled map, which the convolution reads, is this one of the last map
  Places source = in_order(C);
  if (groups > 1) {
    for (int i = 0; i < C; ++i) source[i % groups * (C / groups) + i / groups] = i;
  }
  expand_ = build.pointwise("head.expand", 6 * C, C, source, false, build.parts(stride), false);
  linear_at_ = build.taken();
  fc_ = build.linear("head.fc", config.hidden_features, 6 * C + config.token_dim);
  classifier_ = build.linear("head.classifier", config.num_classes, config.hidden_features);
  end_ = build.taken();
  in_order_.resize(std::max(fc_.inputs, classifier_.inputs));
  std::iota(in_order_.begin(), in_order_.end(), 0);
}

Classifier::Space Classifier::space_for(const Map& last, Arena& arena, const Kernels& kernels) const {
  return {make_map(arena, expand_.outputs, last.height, last.width, false),
          offsets_of(expand_, expand_.reads_bf16() ? last.bf16.run : last.block, kernels)};
}

void Classifier::prepare(Batch& batch, int images) const {
  batch.pooled.resize(size_t(images) * fc_.inputs);
  batch.hidden.resize(size_t(images) * blocks_of(fc_.outputs) * BLOCK);
  batch.logits.resize(size_t(images) * blocks_of(classifier_.outputs) * BLOCK);
}

void Classifier::pool(const Map& last, const float* token, const Kernels& kernels, Space& space, Member& member,
                      Batch& batch, int image, Stages* stages) const {
  Worker& worker = member.worker;
  const Map& out = space.hidden;
  const void* from = expand_.reads_bf16() ? static_cast<const void*>(last.bf16.data) : last.data;
  const int stride = expand_.reads_bf16() ? kernels.bf16_run : BLOCK;
  for (size_t g = 0; g < expand_.groups.size(); ++g) {
    Products products = expand_.groups[g].products;
    products.offsets = space.offsets[g].data();
    products.part_size = last.bf16.part_size;
    products.prefetch = member.prefetch.lines();
    Epilogue e;
    e.bias = expand_.bias + ptrdiff_t(g) * expand_.group_blocks * BLOCK;
    e.act = Act::relu6;
    e.width = out.width;
    e.out_block = out.block;
    e.out_row = out.row;
    e.out = out.data + ptrdiff_t(g) * expand_.group_blocks * out.block;
    int first, last_panel;
    worker.share(panel_count(products.vectors), 1, &first, &last_panel);
    kernels.pointwise(products, e, from, stride, 0, out.positions(), first, last_panel);
  }
  worker.sync();
  float* pooled = batch.pooled.data() + size_t(image) * fc_.inputs;
  int first, end;
  worker.share(out.blocks, 1, &first, &end);
  for (int b = first; b < end; ++b) {
    kernels.mean(out.data + b * out.block, out.positions(), pooled + ptrdiff_t(b) * BLOCK);
  }
  if (worker.rank == 0) std::copy_n(token, fc_.inputs - out.channels, pooled + out.channels);
  worker.sync();
  if (stages) std::copy_n(pooled, out.channels, stages->place("pooled", {out.channels}, image));
  if (member.timer.wanted()) {
    member.timer.mark("head.expand", double(expand_.inputs) * expand_.outputs * out.positions());
  }
}

void Classifier::linear(const Linear& layer, const Kernels& kernels, Worker& worker, const float* in, int images,
                        Act act, float* out) const {
  Products products = layer.products;
  products.offsets = in_order_.data();
  Epilogue e;
  e.bias = layer.bias;
  e.act = act;
  e.out = out;
  e.out_block = BLOCK;
  e.out_row = ptrdiff_t(blocks_of(layer.outputs)) * BLOCK;
  int first, last;
  worker.share(panel_count(products.vectors), 1, &first, &last);
  kernels.pointwise(products, e, in, layer.inputs, 0, images, first, last);
}

void Classifier::classify(const Kernels& kernels, Worker& worker, Batch& batch, int images) const {
  linear(fc_, kernels, worker, batch.pooled.data(), images, Act::hardswish, batch.hidden.data());
  worker.sync();
  linear(classifier_, kernels, worker, batch.hidden.data(), images, Act::identity, batch.logits.data());
}

void Classifier::hand_out(const Batch& batch, int images, float* logits, Stages* stages) const {
  const size_t hidden_row = size_t(blocks_of(fc_.outputs)) * BLOCK;
  const size_t logits_row = size_t(blocks_of(classifier_.outputs)) * BLOCK;
  for (int image = 0; image < images; ++image) {
    std::copy_n(batch.logits.data() + image * logits_row, classes_, logits + size_t(image) * classes_);
    if (!stages) continue;
    std::copy_n(batch.hidden.data() + image * hidden_row, hidden_features_,
                stages->place("hidden", {hidden_features_}, image));
    std::copy_n(logits + size_t(image) * classes_, classes_, stages->place("logits", {classes_}, image));
  }
}

double Classifier::multiply_adds() const {
  return double(fc_.inputs) * hidden_features_ + double(hidden_features_) * classes_;
}

}  // namespace mf::engine
