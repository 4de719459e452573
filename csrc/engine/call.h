// What a call brings along, and what it is to leave.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

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

// Gives a profile, where there is one, the time since the last mark.
class Timer {
 public:
  explicit Timer(Profile* profile) : profile_(profile) {}

  bool wanted() const { return profile_ != nullptr; }
  void mark(const std::string& stage, double multiply_adds);

 private:
  Profile* profile_;
  std::chrono::steady_clock::time_point marked_ = std::chrono::steady_clock::now();
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

}  // namespace mf::engine
