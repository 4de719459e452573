// The engine without Python, on a small network of every kind of block, for the sanitizers: odd sizes, batches,
// several threads in an engine, several callers of one.
#include <cstdio>
#include <random>
#include <thread>

#include "engine/network.h"

using namespace mf::engine;

namespace {

struct Made {
  std::map<std::string, std::vector<float>> values;
  Arrays arrays;

  explicit Made(const Config& config) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0, 0.3f);
    for (const auto& [name, shape] : Network::shapes_of(config)) {
      size_t size = 1;
      for (long side : shape) size *= size_t(side);
      std::vector<float>& numbers = values[name];
      numbers.resize(size);
      for (float& number : numbers) number = normal(random);
      arrays[name] = {numbers.data(), shape};
    }
  }
};

Config small(int groups, bool spatial, int classes = 10) {
  Config config{3, 8, 3, 64, 48, groups, classes, spatial, {}, {0.5f, 0.5f, 0.5f}, {0.2f, 0.2f, 0.2f}};
  config.blocks = {{Kind::lite, 8, 2, 0, groups == 1 ? 1 : 2},
                   {Kind::same, 8, 4, 0, 1},
                   {Kind::down, 32, 6, 4, 2},
                   {Kind::same, 32, 3, 0, 1},
                   {Kind::down, 32, 6, 4, 2},
                   {Kind::same, 32, 3, 0, 1}};
  return config;
}

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) ++failures, std::printf("failed: %s\n", what);
}

std::vector<float> logits_of(const Network& network, const Images& images, const Extras& extras = {}) {
  std::vector<float> logits(size_t(images.batch) * network.config.num_classes);
  network.run(images, logits.data(), extras);
  return logits;
}

void exercise(const Config& config, const Made& made, Precision precision, const Kernels& kernels) {
  const Network one(config, made.arrays, precision, 1, kernels), three(config, made.arrays, precision, 3, kernels);
#ifdef __SANITIZE_THREAD__  // who touches what depends on the number of tasks alone, and it is slow
  const std::vector<std::pair<int, int>> sides{{33, 47}};
  const std::vector<int> batches{1, 4};
#else
  const std::vector<std::pair<int, int>> sides{{33, 47}, {64, 32}};
  const std::vector<int> batches{0, 1, 2, 4};
#endif
  for (const auto& [height, width] : sides) {
    for (int batch : batches) {
      std::vector<float> pixels(size_t(batch) * 3 * height * width);
      std::vector<uint8_t> bytes(pixels.size());
      for (size_t i = 0; i < pixels.size(); ++i) {
        bytes[i] = uint8_t(i * 2654435761u >> 24);
        pixels[i] = float(bytes[i]) / 128 - 1;
      }
      const Images images{pixels.data(), nullptr, batch, 3, height, width};
      const std::vector<float> logits = logits_of(one, images);
      std::vector<std::thread> callers;
      for (int i = 0; i < 2; ++i) {
        callers.emplace_back(
            [&] { expect(logits_of(three, images) == logits, "the same for every number of threads"); });
      }
      for (std::thread& caller : callers) caller.join();
      logits_of(three, {nullptr, bytes.data(), batch, 3, height, width});
      Stages stages;
      stages.batch = batch;
      Profile profile;
      Extras extras;
      extras.stages = &stages;
      extras.profile = &profile;
      expect(logits_of(one, images, extras) == logits, "the same when looked at");
      expect(batch == 0 || stages.named.count("blocks.2.squeeze"), "stages");
    }
  }
}

// Maps and tokens, which the arrays of a backbone alone give as well
std::vector<std::vector<float>> features_of(const Network& network, const Images& images) {
  std::vector<MapShape> shapes;
  network.map_shapes(images.height, images.width, shapes);
  std::vector<std::vector<float>> features;
  for (const MapShape& shape : shapes)
    features.emplace_back(size_t(images.batch) * shape.channels * shape.height * shape.width);
  features.emplace_back(size_t(images.batch) * network.config.num_tokens * network.config.token_dim);
  Extras extras;
  for (size_t i = 0; i < shapes.size(); ++i) extras.maps.push_back(features[i].data());
  extras.tokens = features.back().data();
  network.run(images, nullptr, extras);
  return features;
}

void exercise_backbone(int groups, Precision precision, const Kernels& kernels) {
  const Config whole = small(groups, false), config = small(groups, false, 0);
  Made made(whole);
  const Network with(whole, made.arrays, precision, 1, kernels);
  for (auto at = made.arrays.begin(); at != made.arrays.end();) {
    at = at->first.starts_with("head.") ? made.arrays.erase(at) : std::next(at);
  }
  const Network without(config, made.arrays, precision, 3, kernels);
  for (int batch : {2, 4}) {
    std::vector<float> pixels(size_t(batch) * 3 * 33 * 47);
    for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = float(i % 251) / 125 - 1;
    const Images images{pixels.data(), nullptr, batch, 3, 33, 47};
    expect(features_of(without, images) == features_of(with, images), "the same without a classifier");
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : runnable()) {
    for (int groups : {1, 4}) {
      const Made made(small(groups, false));
      for (Precision precision : {Precision::float32, Precision::bfloat16})
        exercise_backbone(groups, precision, *kernels);
      for (bool spatial : {false, true}) {
        for (Precision precision : {Precision::float32, Precision::bfloat16}) {
          exercise(small(groups, spatial), made, precision, *kernels);
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
