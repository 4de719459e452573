// Images through the network, as one member of the team sees it: either several that it has to itself, or one that all
// members share; each step is then this member's share of it, and a sync stands wherever a member needs what another
// one made. Several go through tokens together, which is where weights are many and products few, and one by one through
// the maps.
#pragma once

#include "engine/call.h"
#include "engine/member.h"
#include "engine/workspace.h"

namespace mf::engine {

class Pass {
 public:
  Pass(const Config& config, const Kernels& kernels, const Weights& weights, Workspace& space, Member& member,
       const Extras& extras, const std::vector<MapShape>& shapes, int first_image, int count)
      : config(config), kernels(kernels), weights(weights), space(space), member(member), worker(member.worker),
        extras(extras), shapes(shapes), first_image(first_image), count(count) {}

  void run(const Images&);

  // What that leaves of the `i`-th of these images
  const Map& last_map(int i) const { return space.results[i].back().out; }
  const float* tokens(int i) const { return space.tokens + ptrdiff_t(i) * config.num_tokens * config.token_dim; }

 private:
  const Config& config;
  const Kernels& kernels;
  const Weights& weights;
  Workspace& space;
  Member& member;
  Worker& worker;
  const Extras& extras;
  const std::vector<MapShape>& shapes;
  const int first_image, count;  // of the batch

  void begin(const Images&);
  void block(size_t i, const Images&);
  void hand_out(size_t i);
  const Map& before(size_t i) const;
  const float* slopes_at(int which, const DepthwiseLayer&) const;
  void stem(const Images&, int first, int last);
  void image_row(const Images&, int row);
  void lite(size_t i, const Images&);
  void same(size_t i);
  void down(size_t i);

  // tokens
  void linear(const Linear&, const float* in, int in_row, int rows, float* out, int out_row, Act = Act::identity,
              const float* residual = nullptr);
  void normalise(const Norm&);
  void mobile_to_former(const MobileToFormer&, size_t block, float* queries);
  void attend_span(const Map& in, int span, int spans, const float* queries, int C);
  void merge_spans(int spans, int C);
  void token_side(size_t i);
  void slopes(const TokenSide&, int which, int reduced_row, const char* stage, const Places& order);
  void mix_tokens(const Map& in, int height, int width);
  void former_to_mobile(const BlockResult&);

  // maps
  Bfloat16Map flat_bf16(const Pointwise& reader, const DepthwiseLayer& made, int positions) const;
  void pointwise(const Pointwise&, const DepthwiseLayer& made, const Offsets&, Map& out, const Map* residual,
                 bool also_bf16, int begin, int end, bool by_panels = false);
  void grouped(const Pointwise&, ptrdiff_t part_size, const Offsets&, Map& out, const Map* residual, bool also_bf16,
               int begin, int end);
  void depthwise(const DepthwiseLayer&, const float* in, ptrdiff_t in_row, const Map& out, int block,
                 const float* slopes, Act, const Pointwise& reader, int first_row, int last_row);
  void depthwise_strips(const char* stage, const DepthwiseLayer&, const Map& in, const float* slopes, Act,
                        const Pointwise&, const Offsets&, Map& out, const Map* residual, bool also_bf16,
                        const Images* = nullptr);
  void spatial_relu(float* x, ptrdiff_t row, int width, int first_row, int last_row, const float* slopes, int places,
                    int block);

  // for whoever looks inside; nothing otherwise
  void dump(const char* stage, const Map&);
  void dump_block(const char* stage, const float* data, ptrdiff_t row, int height, int width, const Places&, int block);
  void dump_flat(const char* stage, const DepthwiseLayer&, int height, int width, const Pointwise& reader);
  void dump_slopes(const char* stage, const float* theta, int rows, const Places& order);
  void dump_tokens(const char* stage);
  void mark(const char* stage, double multiply_adds = 0);

  bool leader() const { return worker.rank == 0; }
  bool spatial() const { return config.spatial_dynamic_relu; }

  std::string full(const char* stage) const;

  // Calls step() for each of the images at work in turn
  template <class F>
  void one_by_one(F step) {
    for (image_ = first_; image_ < last_; ++image_) step();
    image_ = first_;
  }

  int first_ = 0, last_ = 0;  // the images at work, counted from first_image
  int image_ = 0;             // and the one of them that is alone
  int block_ = -1;            // at work
};

}  // namespace mf::engine
