#include "engine/network.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "engine/pass.h"

namespace mf::engine {

namespace {

void run_alone(const std::function<void(Worker&)>& body) {
  std::atomic<unsigned> nobody{0};
  Worker worker(0, 1, &nobody, &nobody);
  body(worker);
}

}  // namespace

float* Stages::place(const std::string& name, std::vector<long> shape, int image) {
  size_t size = 1;
  for (long side : shape) size *= size_t(side);
  auto [at, is_new] = named.try_emplace(name);
  if (is_new) {
    order.push_back(name);
    at->second = {std::move(shape), std::vector<float>(size * batch)};
  }
  return at->second.values.data() + size * image;
}

Profile::Row& Profile::operator[](const std::string& name) {
  const auto [at, is_new] = index.try_emplace(name, rows.size());
  if (is_new) rows.push_back({name});
  return rows[at->second];
}

Network::Network(const Config& config, const Arrays& arrays, bool bf16, int threads, const Kernels& kernels)
    : config(config), kernels(kernels), bf16(bf16), threads(threads), weights_(config, arrays, bf16, kernels),
      team_(threads) {}

std::vector<MapShape> Network::map_shapes(int height, int width) const {
  std::vector<MapShape> shapes;
  int stride = 2;
  height = (height + 1) / 2, width = (width + 1) / 2;
  for (int i = 0; i < int(config.blocks.size()); ++i) {
    const BlockConfig& block = config.blocks[i];
    if (block.stride == 2) stride *= 2, height = (height + 1) / 2, width = (width + 1) / 2;
    if (stride < 4) continue;
    const MapShape shape{i, block.out_channels, height, width};
    // the last block of a level speaks for it
    if (block.stride == 2 || shapes.empty()) {
      shapes.push_back(shape);
    } else {
      shapes.back() = shape;
    }
  }
  return shapes;
}

std::unique_ptr<Workspace> Network::borrow(int height, int width, int members) const {
  {
    std::lock_guard lock(spaces_mutex_);
    for (auto at = spaces_.begin(); at != spaces_.end(); ++at) {
      if ((*at)->height == height && (*at)->width == width && int((*at)->scratch.size()) >= members) {
        std::unique_ptr<Workspace> space = std::move(*at);
        spaces_.erase(at);
        return space;
      }
    }
  }
  return std::make_unique<Workspace>(config, weights_, bf16, height, width, members);
}

void Network::give_back(std::unique_ptr<Workspace> space) const {
  constexpr size_t kept = 16;  // sizes times calls at a time; beyond it the one longest unused goes
  std::lock_guard lock(spaces_mutex_);
  if (spaces_.size() == kept) spaces_.erase(spaces_.begin());
  spaces_.push_back(std::move(space));
}

void Network::run(const Images& images, float* logits, const Extras& extras) const {
  const int width = 6 * weights_.gather.channels + config.token_dim;
  std::vector<float> joints(size_t(images.batch) * width);

  // A batch is dealt out image by image. A team that is at work for another caller is not waited for.
  std::unique_lock team(team_mutex_, std::try_to_lock);
  const bool alone = threads == 1 || !team.owns_lock() || extras.stages || extras.profile;
  const int members = alone ? 1 : threads;
  const int together = images.batch >= members ? 1 : members;  // members on one image
  const std::vector<MapShape> shapes = map_shapes(images.height, images.width);
  if (images.batch > 0) {
    std::vector<std::unique_ptr<Workspace>> spaces;
    for (int i = 0; i < members / together; ++i) spaces.push_back(borrow(images.height, images.width, together));
    const auto body = [&](Worker& worker) {
      const int step = members / together;
      for (int image = together == 1 ? worker.rank : 0; image < images.batch; image += step) {
        std::atomic<unsigned> nobody{0};
        Worker single(0, 1, &nobody, &nobody);
        Worker& hands = together == 1 ? single : worker;
        Workspace& space = *spaces[together == 1 ? worker.rank : 0];
        Pass(*this, weights_, space, hands, extras, shapes, image).run(images);
        if (hands.rank == 0) {
          std::copy_n(space.joint, width, joints.data() + size_t(image) * width);
        }
        hands.sync();  // nobody begins the next image while this one is being read
      }
    };
    members > 1 ? team_.run(body) : run_alone(body);
    for (auto& space : spaces) give_back(std::move(space));
    if (logits) classify(joints.data(), images.batch, logits, extras, members > 1);
  }
}

// The two last layers, on all images at once: their weights are the larger half of what an image reads
void Network::classify(const float* joints, int batch, float* logits, const Extras& extras, bool together) const {
  const auto start = std::chrono::steady_clock::now();
  const auto linear = [&](const Linear& layer, const float* in, Act act, float* out, Worker& worker) {
    Products products = layer.products;
    std::vector<int32_t> offsets(layer.inputs);
    for (int k = 0; k < layer.inputs; ++k) offsets[k] = k;
    products.offsets = offsets.data();
    Epilogue e;
    e.bias = layer.bias;
    e.act = act;
    e.out = out;
    e.out_block = BLOCK;
    e.out_row = ptrdiff_t(blocks_of(layer.outputs)) * BLOCK;
    int first, last;
    worker.share(panel_count(products.vectors), 1, &first, &last);
    kernels.pointwise(products, e, in, layer.inputs, 0, batch, first, last);
  };
  const int hidden_width = blocks_of(weights_.fc.outputs) * BLOCK;
  const int classes_width = blocks_of(weights_.classifier.outputs) * BLOCK;
  std::vector<float> hidden(size_t(batch) * hidden_width), out(size_t(batch) * classes_width);
  const auto body = [&](Worker& worker) {
    linear(weights_.fc, joints, Act::hardswish, hidden.data(), worker);
    worker.sync();
    linear(weights_.classifier, hidden.data(), Act::identity, out.data(), worker);
  };
  together ? team_.run(body) : run_alone(body);
  for (int image = 0; image < batch; ++image) {
    std::copy_n(out.data() + size_t(image) * classes_width, config.num_classes, logits + size_t(image) * config.num_classes);
    if (extras.stages) {
      std::copy_n(hidden.data() + size_t(image) * hidden_width, config.hidden_features,
                  extras.stages->place("hidden", {config.hidden_features}, image));
      std::copy_n(logits + size_t(image) * config.num_classes, config.num_classes,
                  extras.stages->place("logits", {config.num_classes}, image));
    }
  }
  if (extras.profile) {
    Profile::Row& row = (*extras.profile)["head.fc, head.classifier"];
    row.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    row.multiply_adds += double(batch) * (double(weights_.fc.inputs) * config.hidden_features +
                                          double(config.hidden_features) * config.num_classes);
  }
}

}  // namespace mf::engine
