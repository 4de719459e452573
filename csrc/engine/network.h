// The whole network on images of any size: a batch dealt out to the team, workspaces kept for the next call.
#pragma once

#include <mutex>
#include <optional>

#include "engine/call.h"
#include "engine/classifier.h"
#include "engine/team.h"
#include "engine/weights.h"
#include "engine/workspace.h"

namespace mf::engine {

class Network {
 public:
  // Arrays are those of shapes_of(config), exactly. Throws std::invalid_argument.
  Network(const Config&, const Arrays&, Precision, int threads, const Kernels&);

  // Of the arrays that such a network takes. Throws std::invalid_argument.
  static Shapes shapes_of(const Config&);

  // logits (B, classes), or null: then the classifier is left out. Any number of threads may call at a time. Throws
  // std::invalid_argument for logits of a network without a classifier.
  void run(const Images&, float* logits, const Extras& = {}) const;

  void map_shapes(int height, int width, std::vector<MapShape>& shapes) const;

  const Config config;
  const Kernels& kernels;
  const Precision precision;
  const int threads;

 private:
  struct Space {
    Workspace backbone;
    Classifier::Space classifier;
  };

  // What a call needs beside the images' workspaces; kept for the next one
  struct CallSpace {
    std::vector<std::unique_ptr<Space>> spaces;
    Classifier::Batch batch;
    std::vector<MapShape> shapes;
  };

  std::unique_ptr<Space> make_space(int height, int width, int members, int images) const;
  std::unique_ptr<Space> borrow(int height, int width, int members, int images) const;
  void give_back(std::unique_ptr<Space>) const;
  std::unique_ptr<CallSpace> borrow_call() const;

  struct Packed {
    Arena arena;  // of all weights, in the order of execution
    Weights backbone;
    std::optional<Classifier> classifier;
  };
  static Packed pack(const Config&, const Arrays*, Precision, const Kernels&, Shapes*);

  const Packed packed_;
  mutable std::mutex spaces_mutex_;
  mutable std::vector<std::unique_ptr<Space>> spaces_;
  mutable std::vector<std::unique_ptr<CallSpace>> calls_;
  mutable std::mutex team_mutex_;  // held by the call that the team works for
  mutable Team team_;
};

}  // namespace mf::engine
