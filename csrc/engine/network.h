// The whole network on images of any size: what runs when, on whose share of the work.
#pragma once

#include <chrono>
#include <mutex>

#include "engine/team.h"
#include "engine/weights.h"
#include "engine/workspace.h"

namespace mf::engine {

// A batch of images: float [B][channels][H][W], or bytes [B][H][W][channels] that are normalised on the way in.
struct Images {
  const float* floats = nullptr;
  const uint8_t* bytes = nullptr;
  int batch = 0, channels = 0, height = 0, width = 0;
};

// Results by name for whoever looks inside. Every value is [B] times the shape that was said first.
struct Stages {
  struct Stage {
    std::vector<long> shape;  // without B
    std::vector<float> values;
  };
  int batch = 0;
  std::vector<std::string> order;
  std::map<std::string, Stage> named;

  float* place(const std::string& name, std::vector<long> shape, int image);
};

// Seconds and multiply-adds of every stage of one image, summed over the images it saw.
struct Profile {
  struct Row {
    std::string name;
    double seconds = 0, multiply_adds = 0;
  };
  std::vector<Row> rows;
  std::map<std::string, size_t> index;

  Row& operator[](const std::string& name);
};

// What a call wants beside the logits; null where it does not.
struct Extras {
  std::vector<float*> maps;  // [4] of (B, C, h, w) at strides 4, 8, 16, 32
  float* tokens = nullptr;   // (B, M, D)
  Stages* stages = nullptr;
  Profile* profile = nullptr;
};

struct MapShape {
  int block, channels, height, width;
};

class Network {
 public:
  // Throws std::invalid_argument.
  Network(const Config&, const Arrays&, bool bf16, int threads, const Kernels&);

  // logits (B, classes), or null: then the classifier is left out. Any number of threads may call at a time.
  void run(const Images&, float* logits, const Extras& = {}) const;

  void map_shapes(int height, int width, std::vector<MapShape>& shapes) const;

  const Config config;
  const Kernels& kernels;
  const bool bf16;
  const int threads;

 private:
  // What a call needs beside the images' workspaces; kept for the next one
  struct CallSpace {
    std::vector<std::unique_ptr<Workspace>> spaces;
    std::vector<float> joints, hidden, logits;
    std::vector<MapShape> shapes;
  };

  std::unique_ptr<Workspace> borrow(int height, int width, int members, int images) const;
  void give_back(std::unique_ptr<Workspace>) const;
  void classify(CallSpace&, int batch, float* logits, const Extras&, bool together) const;

  const Weights weights_;
  std::vector<int32_t> in_order_;  // 0 1 2 ...: the inputs of the last layers
  mutable std::mutex spaces_mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> spaces_;
  mutable std::vector<std::unique_ptr<CallSpace>> calls_;
  mutable std::mutex team_mutex_;  // held by the call that the team works for
  mutable Team team_;
};

}  // namespace mf::engine
