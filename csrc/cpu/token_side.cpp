// Everything that a block computes on tokens alone, on CPU, in float32: what the bridge gathered goes into the tokens,
// the Former, and what the rest of the block needs of the new tokens. Source: mf_kernels/ops/token_side.py.
//
// Legend: B batch, M tokens, R = B*M rows, D token width, C input and C' output channels of the block, K1 K2 channels
// of its two dynamic ReLUs. With a handful of rows a linear layer is as fast as its weight arrives from memory, so
// weights are read once, as they lie, the next ones already under way, and nothing is packed.
#define MF_EACH_SET_FILE "cpu/token_side.cpp"
#include "cpu/token_side.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "common/tokens.isa.h"
#include "cpu/token_products.isa.h"

namespace mf::MF_ISA {

// Outputs [begin, end) of a linear layer on all rows. Returns with the weight of the following outputs prefetched.
inline void linear_outputs(float* y,        // [R][N]
                           const float* x,  // [R][padded]: rows of K, zeros up to a multiple of 16
                           const LinearLayer& layer, int64_t R, int64_t begin, int64_t end) {
  constexpr int64_t block = 16;  // outputs whose weights stay in the first-level cache while all rows pass
  const int64_t K = layer.inputs, N = layer.outputs, padded = padded_inputs(K);
  float sums[MAX_TOKENS * block];
  Scratch<float> copied(padded == K ? 0 : block * padded);
  for (int64_t n = begin; n < end; n += block) {
    const int64_t here = end - n < block ? end - n : block;
    const float* rows = layer.weight + n * K;
    if (padded != K) {  // rows that do not fill their last vector
      for (int64_t i = 0; i < here; ++i) {
        for (int64_t k = 0; k < padded; ++k) copied[i * padded + k] = k < K ? rows[i * K + k] : 0.0f;
      }
      rows = copied;
    }
    for (int64_t first = 0; first < R; first += MAX_TOKENS) {
      const int64_t count = R - first < MAX_TOKENS ? R - first : MAX_TOKENS;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < here; ++i) sums[r * here + i] = layer.bias[n + i];
      }
      with_tokens(count, [&]<int ROWS>() {
        constexpr int step = SUMS_BLOCK<ROWS>;
        int64_t c = 0;
        for (; c + step <= here; c += step) {
          add_rows_dots<float, ROWS, step, true>(sums + c, x + first * padded, rows + c * padded, here, padded, padded,
                                                 padded);
        }
        for (; c < here; ++c) {
          add_rows_dots<float, ROWS, 1, true>(sums + c, x + first * padded, rows + c * padded, here, padded, padded,
                                              padded);
        }
      });
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < here; ++i) y[(first + r) * N + n + i] = sums[r * here + i];
      }
    }
  }
}

// out = LayerNorm(a + b)
inline void add_and_norm(float* out,      // [R][D]
                         const float* a,  // [R][D]
                         const float* b,  // [R][D]
                         const NormLayer& norm, int64_t R, int64_t D) {
  for (int64_t i = 0; i < R * D; i += LANES<float>) store(out + i, load(a + i) + load(b + i));
  layer_norm(out, norm.weight, norm.bias, norm.eps, R, D);
}

// x *= clamp(gate + 3, 0, 6) / 3, which is 2 hsig(gate)
inline void multiply_gate(float* x, const float* gate, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= 2 * hard_sigmoid(gate[i]);
}

inline void gelu_row(float* x, int64_t count) {  // count a multiple of the lanes
  for (int64_t i = 0; i < count; i += LANES<float>) store(x + i, gelu(load(x + i)));
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter token_side_calls("token_side");

// y = x weight^T + bias over the threads; x is copied where its rows do not fill whole vectors
void linear(float* y, const float* x, const LinearLayer& layer, int64_t R) {
  const int64_t K = layer.inputs, N = layer.outputs, padded = padded_inputs(K);
  Scratch<float> copied(padded == K ? 0 : R * padded);
  if (padded != K) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = 0; k < padded; ++k) copied[r * padded + k] = k < K ? x[r * K + k] : 0.0f;
    }
    x = copied;
  }
  constexpr int64_t grain = 32;  // outputs of one task, a multiple of the kernel's block
  torch::stable::parallel_for(0, ceil_div(N, grain), ceil_div(65536, grain * K), [&](int64_t begin, int64_t end) {
    MF_CALL(linear_outputs(y, x, layer, R, begin * grain, std::min(N, end * grain)));
  });
}

std::vector<Tensor> token_side(Tensor tokens_in, Tensor gathered_in, std::vector<Tensor> parameters_in,
                               int64_t num_heads, double eps) {
  const Arguments arguments("token_side", "tokens", tokens_in, cpu(), {ScalarType::Float});
  arguments.rank("tokens", tokens_in, 3, "(B, M, D)");
  arguments.rank("gathered", gathered_in, 3, "(B, M, C)");
  const int64_t batch = tokens_in.size(0), count = tokens_in.size(1), width = tokens_in.size(2);
  const int64_t channels = std::max<int64_t>(gathered_in.size(2), 1);
  if (count < 1 || count > MAX_TOKENS) {
    refuse("token_side", "tokens", "(B, M, D) with M from 1 to ", MAX_TOKENS, ", got ", shape_text(tokens_in.sizes()));
  }
  if (num_heads < 1 || num_heads > width || width % 16 != 0 || width / 16 % num_heads != 0) {
    refuse("token_side", "num_heads", "a divisor of D / 16 for D = ", width, ", got ", num_heads);
  }
  arguments.size("tokens", {batch, count, width});
  arguments.size("gathered", {batch, count, channels});
  arguments.tensor("tokens", tokens_in, {batch, count, width});
  arguments.tensor("gathered", gathered_in, {batch, count, channels});
  const Tensor tokens = as_contiguous(tokens_in), gathered_map = as_contiguous(gathered_in);  // (B, M, D), (B, M, C)
  const int64_t B = tokens.size(0), M = tokens.size(1), D = tokens.size(2), R = B * M, C = gathered_map.size(2);
  const TokenSideParameters p(std::move(parameters_in), arguments, D, C, float(eps));
  count_served(token_side_calls);
  const auto dtype = tokens.scalar_type();
  const Tensor updated = new_tensor({B, M, D}, dtype);
  const Tensor key = new_tensor({B, M, p.key.outputs}, dtype), value = new_tensor({B, M, p.value.outputs}, dtype);
  std::vector<Tensor> outputs{updated, key, value};
  float* out = mutable_data<float>(updated);
  const float* in = data<float>(tokens);

  Scratch<float> gathered(R * C), gate(R * C), a(R * 2 * D), b(R * 2 * D), current(R * D);
  std::memcpy(gathered, data<float>(gathered_map), R * C * sizeof(float));
  linear(gate, in, p.gate, R);
  MF_CALL(multiply_gate(gathered, gate, R * C));
  linear(a, gathered, p.bridge, R);
  MF_CALL(add_and_norm(current, in, a, p.bridge_norm, R, D));

  linear(a, current, p.query, R);
  const float scale = float(LOG2_E) / std::sqrt(float(D / num_heads));
  for (int64_t i = 0, at = 0; i < B; ++i, at += M * D) {
    MF_CALL(attend_tokens(b + at, a + at, current + at, scale, M, M, D, num_heads));
  }
  linear(a, b, p.mix, R);
  MF_CALL(add_and_norm(current, current, a, p.attention_norm, R, D));
  linear(a, current, p.expand, R);
  MF_CALL(gelu_row(a, R * 2 * D));
  linear(b, a, p.contract, R);
  MF_CALL(add_and_norm(out, current, b, p.ffn_norm, R, D));

  linear(mutable_data<float>(key), out, p.key, R);
  linear(mutable_data<float>(value), out, p.value, R);
  Scratch<float> first_tokens(B * D), hidden(B * D);
  for (int64_t i = 0; i < B; ++i) std::memcpy(first_tokens + i * D, out + i * M * D, D * sizeof(float));
  for (const SlopeLayers& slopes : p.slopes) {
    const Tensor theta = new_tensor({B, slopes.expand.outputs}, dtype);
    linear(hidden, first_tokens, slopes.reduce, B);
    for (int64_t i = 0; i < B * slopes.reduce.outputs; ++i) hidden[i] = std::max(hidden[i], 0.0f);
    linear(mutable_data<float>(theta), hidden, slopes.expand, B);
    outputs.push_back(theta);
  }
  return outputs;
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) { m.impl("token_side.native", TORCH_BOX(&mf::token_side)); }

#endif
