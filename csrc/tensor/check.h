// What an operator is given, checked before anything is read: torch.ops is open to any caller, and a kernel turns shapes
// into addresses. Said once for CPU and CUDA. A message is one line: operator, argument, what was expected, what came.
#pragma once

#include "common/math.h"
#include "tensor/feature_map.h"

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mf {

using torch::headeronly::ScalarType;

constexpr int64_t MOST_ELEMENTS = int64_t(1) << 40;  // of one tensor: sizes made of it then stay within 64 bits
constexpr int64_t LONGEST_SIDE = (int64_t(1) << 31) - 1;

struct Argument {  // its name; of a list also the place
  const char* name;
  int64_t place = -1;
  Argument(const char* name, int64_t place = -1) : name(name), place(place) {}
};

// Out of line, all of them: what the compiler may inline in a file is counted over the file, kernels and all
#define MF_CHECK [[gnu::noinline]]

template <class... Parts>
[[noreturn, gnu::cold]] MF_CHECK void refuse(const char* op, Argument argument, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": " << argument.name;
  if (argument.place >= 0) text << '[' << argument.place << ']';
  text << ": expected ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

// The bytes from a tensor's first element to its last
struct Extent {
  const char *begin, *end;
  explicit Extent(const Tensor& t) : begin(static_cast<const char*>(t.data_ptr())), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end += (last + 1) * int64_t(t.element_size());
  }
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// The arguments of one call: the first one says dtype and device of the others.
class Arguments {
 public:
  const char* const op;

  Arguments(const char* op, Argument name, const Tensor& first, Place place, std::initializer_list<ScalarType> served)
      : op(op) {
    if (!first.defined()) refuse(op, name, "a tensor, got none");
    device_type_ = place.device_type;
    device_index_ = first.get_device_index();
    dtype_ = first.scalar_type();
    if (std::find(served.begin(), served.end(), dtype_) == served.end()) {
      std::ostringstream names;
      for (const ScalarType dtype : served) names << (names.tellp() > 0 ? ", " : "") << dtype;
      refuse(op, name, "one of the dtypes ", names.str(), ", got ", dtype_);
    }
  }

  ScalarType dtype() const { return dtype_; }

  // Exactly this shape, the first argument's dtype or another one, its device, all of it in memory
  void tensor(Argument name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    tensor(name, t, shape, dtype_);
  }
  MF_CHECK void tensor(Argument name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) const {
    if (!t.defined()) refuse(op, name, "a tensor, got none");
    const auto sizes = t.sizes();
    if (sizes.size() != shape.size() || !std::equal(sizes.begin(), sizes.end(), shape.begin())) {
      refuse(op, name, "shape ", shape_text(shape), ", got ", shape_text(sizes));
    }
    if (t.scalar_type() != dtype) refuse(op, name, "dtype ", dtype, ", got ", t.scalar_type());
    int32_t device_type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    if (device_type != device_type_ || t.get_device_index() != device_index_) {
      refuse(op, name, "a tensor on the device of the first argument and of this kernel, got another");
    }
    in_memory(name, t);
  }

  // x (B, C, H, W), C, H and W at least 1
  MF_CHECK void feature_map(Argument name, const Tensor& x) const {
    rank(name, x, 4, "(B, C, H, W)");
    const auto sizes = x.sizes();
    const int64_t B = sizes[0], C = sizes[1], H = sizes[2], W = sizes[3];
    if (C < 1 || H < 1 || W < 1) refuse(op, name, "C, H and W of at least 1, got ", shape_text(sizes));
    size(name, {B, C, H, W});
    tensor(name, x, {B, C, H, W});
  }

  // (B, M, C) of x's batch and channels, M from 1 to 8, and heads that divide C
  MF_CHECK void tokens(Argument name, const Tensor& t, const Tensor& x, int64_t num_heads) const {
    if (num_heads < 1 || x.size(1) % num_heads != 0) {
      refuse(op, "num_heads", "a divisor of C = ", x.size(1), ", got ", num_heads);
    }
    rank(name, t, 3, "(B, M, C)");
    if (t.size(1) < 1 || t.size(1) > MAX_TOKENS) {
      refuse(op, name, "(B, M, C) with M from 1 to ", MAX_TOKENS, ", got ", shape_text(t.sizes()));
    }
    tensor(name, t, {x.size(0), t.size(1), x.size(1)});
  }

  // theta (B, M, 2C) of x's batch and channels, M from 1 to 8, and alpha (B, M, H, W) of x's positions
  MF_CHECK void spatial_slopes(const Tensor& x, const Tensor& theta, const Tensor& alpha) const {
    rank("theta", theta, 3, "(B, M, 2C)");
    const int64_t M = theta.size(1);
    if (M < 1 || M > MAX_TOKENS) {
      refuse(op, "theta", "(B, M, 2C) with M from 1 to ", MAX_TOKENS, ", got ", shape_text(theta.sizes()));
    }
    tensor("theta", theta, {x.size(0), M, 2 * x.size(1)});
    tensor("alpha", alpha, {x.size(0), M, x.size(2), x.size(3)});
  }

  // weight (C*mult, 1, K, K), K 3 or 5, bias (C*mult), stride 1 or 2
  MF_CHECK void depthwise(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          int64_t stride) const {
    rank("weight", weight, 4, "(C*mult, 1, K, K)");
    const int64_t C = x.size(1), O = weight.size(0), K = weight.size(2);
    if (weight.size(1) != 1 || K != weight.size(3) || (K != 3 && K != 5) || O < 1 || O % C != 0) {
      refuse(op, "weight", "(C*mult, 1, K, K) with C = ", C, " and K of 3 or 5, got ", shape_text(weight.sizes()));
    }
    if (stride != 1 && stride != 2) refuse(op, "stride", "1 or 2, got ", stride);
    size("weight", {x.size(0), O, x.size(2), x.size(3)});
    tensor("weight", weight, {O, 1, K, K});
    if (bias) tensor("bias", *bias, {O});
  }

  void rank(Argument name, const Tensor& t, int64_t dims, const char* letters) const {
    if (!t.defined()) refuse(op, name, "a tensor, got none");
    if (t.dim() != dims) refuse(op, name, letters, ", got ", t.dim(), " dimensions, ", shape_text(t.sizes()));
  }

  // What is made of these sides can be counted
  MF_CHECK void size(Argument name, std::initializer_list<int64_t> sides) const {
    int64_t elements = 1;
    for (const int64_t side : sides) {
      if (side > LONGEST_SIDE || elements > MOST_ELEMENTS / std::max<int64_t>(side, 1)) {
        refuse(op, name, "at most 2^31 - 1 a side and 2^40 elements, got ", shape_text(sides));
      }
      elements *= std::max<int64_t>(side, 1);
    }
  }

  // `t` is written to, as it lies. A layout that would be copied first would lose what is written
  MF_CHECK void written(Argument name, const Tensor& t) const {
    if (!t.is_contiguous() && !(t.dim() == 4 && is_channels_last(t))) {
      refuse(op, name, "contiguous or channels_last, since it is written to, got other strides");
    }
  }
  // No element of `other` lies in the memory of `t`, which is written to
  MF_CHECK void apart(Argument name, const Tensor& t, Argument other_name, const Tensor& other) const {
    if (Extent(t).overlaps(Extent(other))) {
      refuse(op, other_name, "memory apart from ", name.name, ", which is written to, got a part of it; clone() it");
    }
  }

 private:
  int32_t device_type_, device_index_;
  ScalarType dtype_;

  // A storage may have been resized under a tensor
  MF_CHECK void in_memory(Argument name, const Tensor& t) const {
    if (t.numel() == 0) return;
    int64_t last = t.storage_offset(), bytes;
    const auto sizes = t.sizes(), strides = t.strides();  // asked for once: each question is a call of torch's
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    const int64_t needed = (last + 1) * int64_t(t.element_size());
    if (needed > bytes) refuse(op, name, needed, " bytes of storage for its shape and strides, got ", bytes);
  }
};

#undef MF_CHECK

}  // namespace mf
