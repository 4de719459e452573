#include "engine/network.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "engine/pass.h"

namespace mf::engine {
namespace {

constexpr size_t KEPT = 16;  // workspaces, of sizes times calls at a time; beyond it the one longest unused goes

template <class F>
void run_alone(const F& body) {
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
      team_(threads) {
  in_order_.resize(std::max(weights_.fc.inputs, weights_.classifier.inputs));
  std::iota(in_order_.begin(), in_order_.end(), 0);
}

void Network::map_shapes(int height, int width, std::vector<MapShape>& shapes) const {
  shapes.clear();
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
}

std::unique_ptr<Workspace> Network::borrow(int height, int width, int members, int images) const {
  {
    std::lock_guard lock(spaces_mutex_);
    auto small = spaces_.end();
    for (auto at = spaces_.begin(); at != spaces_.end(); ++at) {
      if ((*at)->height != height || (*at)->width != width) continue;
      if (int((*at)->scratch.size()) >= members && (*at)->images >= images) {
        std::unique_ptr<Workspace> space = std::move(*at);
        spaces_.erase(at);
        return space;
      }
      if (int((*at)->scratch.size()) <= members && (*at)->images <= images) small = at;
    }
    if (small != spaces_.end()) spaces_.erase(small);  // the one to be made serves wherever this one did
  }
  return std::make_unique<Workspace>(config, weights_, kernels, height, width, members, images);
}

void Network::give_back(std::unique_ptr<Workspace> space) const {
  std::lock_guard lock(spaces_mutex_);
  if (spaces_.size() == KEPT) spaces_.erase(spaces_.begin());
  spaces_.push_back(std::move(space));
}

void Network::run(const Images& images, float* logits, const Extras& extras) const {
  if (images.batch == 0) return;
  std::unique_ptr<CallSpace> call;
  {
    std::lock_guard lock(spaces_mutex_);
    if (!calls_.empty()) {
      call = std::move(calls_.back());
      calls_.pop_back();
    }
  }
  if (!call) call = std::make_unique<CallSpace>();
  const int width = weights_.fc.inputs;
  call->joints.resize(size_t(images.batch) * width);
  map_shapes(images.height, images.width, call->shapes);

  // A batch is dealt out, some images that go together to a member. A team that is at work for another caller is not
  // waited for.
  std::unique_lock team(team_mutex_, std::try_to_lock);
  const bool alone = threads == 1 || !team.owns_lock() || !team_.here() || extras.stages || extras.profile;
  const int members = alone ? 1 : threads;
  const bool shared = images.batch < members;  // the members share each image
  const int shares = shared ? 1 : members, each = shared ? 1 : (images.batch + shares - 1) / shares;
  const int turns = (each + TOGETHER - 1) / TOGETHER, count = (each + turns - 1) / turns;
  for (int i = 0; i < shares; ++i) {
    call->spaces.push_back(borrow(images.height, images.width, shared ? members : 1, count));
  }
  const auto body = [&](Worker& worker) {
    std::atomic<unsigned> nobody{0};
    Worker single(0, 1, &nobody, &nobody);
    Worker& hands = shared ? worker : single;
    int first = 0, last = images.batch;
    if (!shared) worker.share(images.batch, 1, &first, &last);
    Workspace& space = *call->spaces[shared ? 0 : worker.rank];
    for (int image = first; image < last; image += count) {
      const int here = std::min(count, last - image);
      Pass(*this, weights_, space, hands, extras, call->shapes, image, here).run(images);
      if (hands.rank == 0) std::copy_n(space.joint, size_t(here) * width, call->joints.data() + size_t(image) * width);
      hands.sync();  // nobody begins the next images while these are being read
    }
  };
  members > 1 ? team_.run(std::ref(body)) : run_alone(body);
  for (auto& space : call->spaces) give_back(std::move(space));
  call->spaces.clear();
  if (logits) classify(*call, images.batch, logits, extras, members > 1);
  std::lock_guard lock(spaces_mutex_);
  if (calls_.size() < KEPT) calls_.push_back(std::move(call));
}

// The two last layers, on all images at once: their weights are the larger half of what an image reads
void Network::classify(CallSpace& call, int batch, float* logits, const Extras& extras, bool together) const {
  const auto start = std::chrono::steady_clock::now();
  const auto linear = [&](const Linear& layer, const float* in, Act act, float* out, Worker& worker) {
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
    kernels.pointwise(products, e, in, layer.inputs, 0, batch, first, last);
  };
  const size_t hidden_row = size_t(blocks_of(weights_.fc.outputs)) * BLOCK;
  const size_t logits_row = size_t(blocks_of(weights_.classifier.outputs)) * BLOCK;
  call.hidden.resize(batch * hidden_row);
  call.logits.resize(batch * logits_row);
  const auto body = [&](Worker& worker) {
    linear(weights_.fc, call.joints.data(), Act::hardswish, call.hidden.data(), worker);
    worker.sync();
    linear(weights_.classifier, call.hidden.data(), Act::identity, call.logits.data(), worker);
  };
  together ? team_.run(std::ref(body)) : run_alone(body);
  const int classes = config.num_classes;
  for (int image = 0; image < batch; ++image) {
    std::copy_n(call.logits.data() + image * logits_row, classes, logits + size_t(image) * classes);
    if (!extras.stages) continue;
    std::copy_n(call.hidden.data() + image * hidden_row, config.hidden_features,
                extras.stages->place("hidden", {config.hidden_features}, image));
    std::copy_n(logits + size_t(image) * classes, classes, extras.stages->place("logits", {classes}, image));
  }
  if (!extras.profile) return;
  Profile::Row& row = (*extras.profile)["head.fc, head.classifier"];
  row.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  row.multiply_adds += double(batch) * (double(weights_.fc.inputs) * config.hidden_features +
                                        double(config.hidden_features) * config.num_classes);
}

}  // namespace mf::engine
