#include "engine/network.h"

#include <algorithm>
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

Network::Packed Network::pack(const Config& config, const Arrays* arrays, Precision precision, const Kernels& kernels,
                              Shapes* shapes) {
  if (config.num_classes < 0) {
    throw std::invalid_argument("config: num_classes: expected at least 0, got " + std::to_string(config.num_classes));
  }
  Packed packed;
  Reader read(arrays);
  LayerBuilder build(config, read, packed.arena, precision, kernels);
  packed.backbone = Weights(config, build);
  if (config.num_classes > 0) packed.classifier.emplace(config, build);
  read.finish();
  if (shapes) *shapes = read.shapes();
  return packed;
}

Network::Network(const Config& config, const Arrays& arrays, Precision precision, int threads, const Kernels& kernels)
    : config(config), kernels(kernels), precision(precision), threads(threads),
      packed_(pack(config, &arrays, precision, kernels, nullptr)), team_(threads) {}

Shapes Network::shapes_of(const Config& config) {
  Shapes shapes;
  pack(config, nullptr, Precision::float32, *runnable().front(), &shapes);
  return shapes;
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

std::unique_ptr<Network::Space> Network::make_space(int height, int width, int members, int images) const {
  const std::optional<Classifier>& classifier = packed_.classifier;
  auto space = std::unique_ptr<Space>(new Space{Workspace(config, packed_.backbone, kernels, height, width, members,
                                                          images, classifier ? classifier->parts() : 0),
                                                {}});
  Workspace& own = space->backbone;
  if (classifier) space->classifier = classifier->space_for(own.results[0].back().out, own.arena, kernels);
  return space;
}

std::unique_ptr<Network::Space> Network::borrow(int height, int width, int members, int images) const {
  {
    std::lock_guard lock(spaces_mutex_);
    auto small = spaces_.end();
    for (auto at = spaces_.begin(); at != spaces_.end(); ++at) {
      if ((*at)->backbone.height != height || (*at)->backbone.width != width) continue;
      if (int((*at)->backbone.scratch.size()) >= members && (*at)->backbone.images >= images) {
        std::unique_ptr<Space> space = std::move(*at);
        spaces_.erase(at);
        return space;
      }
      if (int((*at)->backbone.scratch.size()) <= members && (*at)->backbone.images <= images) small = at;
    }
    if (small != spaces_.end()) spaces_.erase(small);  // the one to be made serves wherever this one did
  }
  return make_space(height, width, members, images);
}

void Network::give_back(std::unique_ptr<Space> space) const {
  std::lock_guard lock(spaces_mutex_);
  if (spaces_.size() == KEPT) spaces_.erase(spaces_.begin());
  spaces_.push_back(std::move(space));
}

std::unique_ptr<Network::CallSpace> Network::borrow_call() const {
  std::lock_guard lock(spaces_mutex_);
  if (calls_.empty()) return std::make_unique<CallSpace>();
  std::unique_ptr<CallSpace> call = std::move(calls_.back());
  calls_.pop_back();
  return call;
}

void Network::run(const Images& images, float* logits, const Extras& extras) const {
  if (logits && !packed_.classifier) {
    throw std::invalid_argument("logits: expected none, since this network has no classifier");
  }
  if (images.batch == 0) return;
  const Classifier* classifier = logits ? &*packed_.classifier : nullptr;
  std::unique_ptr<CallSpace> call = borrow_call();
  if (classifier) classifier->prepare(call->batch, images.batch);
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
  // Images [first, last) of the batch, which go together
  const auto together = [&](Worker& worker, Space& space, int first, int last) {
    // the linear layers of the classifier serve the whole batch at once: their weights come after its last images
    const size_t end = !classifier            ? packed_.backbone.end
                       : last == images.batch ? classifier->end()
                                              : classifier->linear_at();
    Member member{worker, Prefetcher(packed_.arena, end, worker), Timer(worker.rank == 0 ? extras.profile : nullptr)};
    Pass pass(config, kernels, packed_.backbone, space.backbone, member, extras, call->shapes, first, last - first);
    pass.run(images);
    for (int i = 0; classifier && first + i < last; ++i) {
      classifier->pool(pass.last_map(i), pass.tokens(i), kernels, space.classifier, member, call->batch, first + i,
                       extras.stages);
    }
  };
  const auto body = [&](Worker& worker) {
    std::atomic<unsigned> nobody{0};
    Worker single(0, 1, &nobody, &nobody);
    int first = 0, last = images.batch;
    if (!shared) worker.share(images.batch, 1, &first, &last);
    for (int image = first; image < last; image += count) {
      together(shared ? worker : single, *call->spaces[shared ? 0 : worker.rank], image, std::min(image + count, last));
    }
  };
  const auto run = [&](const auto& each_member) {
    members > 1 ? team_.run(std::ref(each_member)) : run_alone(each_member);
  };
  run(body);
  for (auto& space : call->spaces) give_back(std::move(space));
  call->spaces.clear();
  if (classifier) {
    Timer timer(extras.profile);
    run([&](Worker& worker) { classifier->classify(kernels, worker, call->batch, images.batch); });
    classifier->hand_out(call->batch, images.batch, logits, extras.stages);
    if (timer.wanted()) timer.mark("head.fc, head.classifier", images.batch * classifier->multiply_adds());
  }
  std::lock_guard lock(spaces_mutex_);
  if (calls_.size() < KEPT) calls_.push_back(std::move(call));
}

}  // namespace mf::engine
