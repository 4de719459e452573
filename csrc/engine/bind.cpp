// mobileformer._engine: the network for Python. The only file here that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include <algorithm>
#include <cmath>

#include "common/interface.h"
#include "engine/network.h"

namespace py = pybind11;

namespace mf::engine {
namespace {

inline bool leaving() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

// Without the interpreter's lock. A daemon thread that asks for it while the interpreter is on its way out would be
// unwound, through objects that must not be touched without it and destructors that may not throw; it sleeps until the
// process is gone, as Pythons from 3.14 have it themselves. The interpreter may begin to leave while the thread waits
// for the lock, so that to look first is not enough: what unwinds the thread is caught as well.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() {
#ifdef __GLIBCXX__
    try {
      lock();
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    lock();
#endif
  }

 private:
  void lock() const {
    while (leaving()) pause();
    PyEval_RestoreThread(state);
  }
};

using Floats = py::array_t<float, py::array::c_style>;

Config read_config(const py::dict& given) {
  const auto number = [](const py::handle& from, const char* key) { return py::cast<int>(from[key]); };
  Config config;
  config.in_chans = number(given, "in_chans");
  config.stem_channels = number(given, "stem_channels");
  config.num_tokens = number(given, "num_tokens");
  config.token_dim = number(given, "token_dim");
  config.hidden_features = number(given, "hidden_features");
  config.groups = number(given, "groups");
  config.num_classes = number(given, "num_classes");
  config.spatial_dynamic_relu = py::cast<bool>(given["spatial_dynamic_relu"]);
  for (const py::handle& each : given["blocks"]) {
    const auto kind = py::cast<std::string>(each["kind"]);
    if (kind != "lite" && kind != "same" && kind != "down") {
      throw std::invalid_argument("config: kind: expected lite, same or down, got " + kind);
    }
    config.blocks.push_back({kind == "lite"   ? Kind::lite
                             : kind == "same" ? Kind::same
                                              : Kind::down,
                             number(each, "out_channels"), number(each, "expansion"), number(each, "second_expansion"),
                             number(each, "stride")});
  }
  if (!given["mean"].is_none()) config.mean = py::cast<std::vector<float>>(given["mean"]);
  if (!given["std"].is_none()) config.std = py::cast<std::vector<float>>(given["std"]);
  return config;
}

constexpr std::pair<const char*, Precision> PRECISIONS[] = {{"float32", Precision::float32},
                                                            {"bfloat16", Precision::bfloat16}};

Precision precision_of(const std::string& dtype) {
  std::string names;
  for (const auto& [name, precision] : PRECISIONS) {
    if (dtype == name) return precision;
    names += (names.empty() ? "" : " or ") + std::string(name);
  }
  throw std::invalid_argument("dtype: expected " + names + ", got " + dtype);
}

std::string name_of(Precision wanted) {
  for (const auto& [name, precision] : PRECISIONS) {
    if (precision == wanted) return name;
  }
  throw std::logic_error("a precision without a name");
}

const Kernels& choose(const std::string& isa) {
  const std::vector<const Kernels*> able = runnable();
  if (isa.empty()) return *able.back();
  std::string names;
  for (const Kernels* kernels : able) {
    if (isa == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("isa: expected one of " + names + ", got " + isa);
}

std::vector<std::string> names_of(const std::vector<const Kernels*>& levels) {
  std::vector<std::string> names;
  for (const Kernels* level : levels) names.push_back(level->name);
  return names;
}

std::string shape_text(const py::array& array) { return py::cast<std::string>(py::str(array.attr("shape"))); }

class PyNetwork {
 public:
  PyNetwork(const py::dict& config, const py::dict& given, const std::string& dtype, int threads,
            const std::string& isa) {
    const Precision precision = precision_of(dtype);
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
    Arrays arrays;
    std::vector<Floats> held;
    for (const auto& [key, value] : given) {
      const auto name = py::cast<std::string>(key);
      if (!py::isinstance<Floats>(value)) {
        throw std::invalid_argument("arrays: " + name + ": expected a contiguous float32 array");
      }
      held.push_back(py::cast<Floats>(value));
      const Floats& array = held.back();
      arrays[name] = {array.data(), std::vector<long>(array.shape(), array.shape() + array.ndim())};
    }
    const Kernels& kernels = choose(isa);
    const Config read = read_config(config);
    Unlocked unlocked;
    network_ = std::make_unique<Network>(read, arrays, precision, threads, kernels);
  }

  Floats forward(const py::array& x) const {
    const Images images = read(x);
    if (network_->config.num_classes == 0) {
      throw std::invalid_argument("forward: this network has no classifier, only forward_features");
    }
    Floats logits({images.batch, network_->config.num_classes});
    float* to = logits.mutable_data();
    Unlocked unlocked;
    network_->run(images, to);
    return logits;
  }

  py::tuple forward_features(const py::array& x) const {
    const Images images = read(x);
    Extras extras;
    py::list maps;
    std::vector<MapShape> shapes;
    network_->map_shapes(images.height, images.width, shapes);
    for (const MapShape& shape : shapes) {
      Floats map({images.batch, shape.channels, shape.height, shape.width});
      extras.maps.push_back(map.mutable_data());
      maps.append(map);
    }
    Floats tokens({images.batch, network_->config.num_tokens, network_->config.token_dim});
    extras.tokens = tokens.mutable_data();
    {
      Unlocked unlocked;
      network_->run(images, nullptr, extras);
    }
    return py::make_tuple(maps, tokens);
  }

  py::dict stages(const py::array& x) const {
    const Images images = read(x);
    Stages stages;
    stages.batch = images.batch;
    Extras extras;
    extras.stages = &stages;
    std::vector<float> logits = logits_of(images);
    {
      Unlocked unlocked;
      network_->run(images, logits.empty() ? nullptr : logits.data(), extras);
    }
    py::dict result;
    for (const std::string& name : stages.order) {
      const Stages::Stage& stage = stages.named.at(name);
      std::vector<long> shape{images.batch};
      shape.insert(shape.end(), stage.shape.begin(), stage.shape.end());
      Floats values(shape);
      std::copy(stage.values.begin(), stage.values.end(), values.mutable_data());
      result[py::str(name)] = values;
    }
    return result;
  }

  py::list profile(const py::array& x, int repeats) const {
    const Images images = read(x);
    Profile least;  // of each stage the fastest run
    std::vector<float> logits = logits_of(images);
    {
      Unlocked unlocked;
      for (int i = 0; i < repeats; ++i) {
        Profile profile;
        Extras extras;
        extras.profile = &profile;
        network_->run(images, logits.empty() ? nullptr : logits.data(), extras);
        for (const Profile::Row& row : profile.rows) {
          Profile::Row& kept = least[row.name];
          kept.seconds = i == 0 ? row.seconds : std::min(kept.seconds, row.seconds);
          kept.multiply_adds = row.multiply_adds;
        }
      }
    }
    py::list rows;
    for (const Profile::Row& row : least.rows) {
      rows.append(py::make_tuple(row.name, row.seconds, std::llround(row.multiply_adds)));
    }
    return rows;
  }

  std::string isa() const { return network_->kernels.name; }
  std::string dtype() const { return name_of(network_->precision); }
  int threads() const { return network_->threads; }

 private:
  // Room for the logits; none where there is no classifier
  std::vector<float> logits_of(const Images& images) const {
    return std::vector<float>(size_t(images.batch) * network_->config.num_classes);
  }

  Images read(const py::array& x) const {
    const Config& config = network_->config;
    const bool bytes = py::isinstance<py::array_t<uint8_t>>(x), floats = py::isinstance<py::array_t<float>>(x);
    const int channel_axis = bytes ? 3 : 1;
    if ((!bytes && !floats) || x.ndim() != 4 || x.shape(channel_axis) != config.in_chans ||
        !(x.flags() & py::array::c_style)) {
      const std::string C = std::to_string(config.in_chans);
      throw std::invalid_argument("x: expected contiguous float32 (B, " + C + ", H, W) or uint8 (B, H, W, " + C +
                                  "), got " + py::cast<std::string>(py::str(x.dtype())) + " " + shape_text(x));
    }
    Images images;
    images.batch = int(x.shape(0));
    images.channels = config.in_chans;
    images.height = int(x.shape(bytes ? 1 : 2));
    images.width = int(x.shape(bytes ? 2 : 3));
    if (images.height < 32 || images.width < 32 || long(images.height) * images.width > (1L << 24)) {
      throw std::invalid_argument("x: expected a height and width of at least 32 and at most 2^24 pixels, got " +
                                  shape_text(x));
    }
    if (bytes && (int(config.mean.size()) != config.in_chans || int(config.std.size()) != config.in_chans)) {
      throw std::invalid_argument("x: bytes are normalised with the network's mean and std, and it has none");
    }
    if (bytes) {
      images.bytes = static_cast<const uint8_t*>(x.data());
    } else {
      images.floats = static_cast<const float*>(x.data());
    }
    return images;
  }

  std::unique_ptr<Network> network_;
};

}  // namespace

PYBIND11_MODULE(_engine, module) {
  module.doc() = "Inference of a folded Mobile-Former on the CPU; see mobileformer.inference.Engine";
  module.attr("INTERFACE") = MF_INTERFACE;
  module.def("isas", [] { return names_of(runnable()); }, "Instruction sets that this CPU runs, the best one last");
  module.def("compiled", [] { return names_of(compiled()); }, "Instruction sets that were compiled");
  module.def(
      "array_shapes", [](const py::dict& config) { return Network::shapes_of(read_config(config)); }, py::arg("config"),
      "{name: shape} of the arrays that a network of this configuration takes");
  py::class_<PyNetwork>(module, "Network")
      .def(py::init<const py::dict&, const py::dict&, const std::string&, int, const std::string&>(), py::arg("config"),
           py::arg("arrays"), py::arg("dtype") = "float32", py::arg("threads") = 1, py::arg("isa") = "")
      .def("forward", &PyNetwork::forward, py::arg("x"))
      .def("forward_features", &PyNetwork::forward_features, py::arg("x"))
      .def("stages", &PyNetwork::stages, py::arg("x"))
      .def("profile", &PyNetwork::profile, py::arg("x"), py::arg("repeats") = 10)
      .def_property_readonly("isa", &PyNetwork::isa)
      .def_property_readonly("dtype", &PyNetwork::dtype)
      .def_property_readonly("threads", &PyNetwork::threads);
}

}  // namespace mf::engine
