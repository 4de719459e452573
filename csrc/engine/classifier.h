// What makes logits of a backbone's last map and tokens: a pointwise layer and its mean over the map, image by image,
// and two linear layers, on all images of a batch at once.
#pragma once

#include "engine/member.h"
#include "engine/workspace.h"

namespace mf::engine {

class Classifier {
 public:
  Classifier(const Config&, LayerBuilder&);  // throws std::invalid_argument

  // What one image at a time needs, for maps of one size
  struct Space {
    Map hidden;
    Offsets offsets;
  };
  Space space_for(const Map& last, Arena&, const Kernels&) const;

  // What a batch needs
  struct Batch {
    std::vector<float> pooled;  // [images][pooled channels, then the first token]
    std::vector<float> hidden, logits;
  };
  void prepare(Batch&, int images) const;

  // Image `image` of the batch, as a member of the team sees it: the mean of its last map, and its first token
  void pool(const Map& last, const float* token, const Kernels&, Space&, Member&, Batch&, int image, Stages*) const;

  // All images: their weights are the larger half of what an image reads
  void classify(const Kernels&, Worker&, Batch&, int images) const;

  // logits (B, classes)
  void hand_out(const Batch&, int images, float* logits, Stages*) const;

  double multiply_adds() const;                  // of the linear layers, for one image
  int parts() const { return expand_.parts(); }  // of bfloat16 of the last map, 0 where it is read as floats

  // Bytes of the arena before the weights of the linear layers, and before what follows them
  size_t linear_at() const { return linear_at_; }
  size_t end() const { return end_; }

 private:
  void linear(const Linear&, const Kernels&, Worker&, const float* in, int images, Act, float* out) const;

  Pointwise expand_;
  Linear fc_, classifier_;
  int hidden_features_, classes_;
  size_t linear_at_, end_;
  std::vector<int32_t> in_order_;  // 0 1 2 ...: the inputs of the linear layers
};

}  // namespace mf::engine
