// What happens to tokens between their linear layers, and the small passes over maps. No include guard: once per
// instruction set.

namespace mf::engine::MF_ISA {

inline void layer_norm(float* x, const float* weight, const float* bias, int D, int rows) {
  mf::MF_ISA::layer_norm(x, weight, bias, 1e-5f, rows, D);
}

// q carries scale and log2(e)
inline void former_attention(const float* q, const float* tokens, float* out, int D, int M, int rows) {
  attend_tokens(out, q, tokens, 1.0f, M, rows, D, FORMER_HEADS);
}

// x [rows][width][16] of one block: the larger of two lines, whose slopes are the mix [positions][8] of those of the
// tokens [2][M][16]
inline void spatial_relu(float* x, ptrdiff_t row, int width, int rows, const float* mix, const float* slopes, int M) {
  for (int y = 0; y < rows; ++y) {
    for (int p = 0; p < width; ++p, mix += MAX_TOKENS) {
      float* at = x + y * row + ptrdiff_t(p) * BLOCK;
      for (int lane = 0; lane < BLOCK; lane += LANES) {
        V slope1{}, slope2{};
        for (int m = 0; m < M; ++m) {
          slope1 += load(slopes + m * BLOCK + lane) * mix[m];
          slope2 += load(slopes + (M + m) * BLOCK + lane) * mix[m];
        }
        const V value = load(at + lane);
        store(at + lane, maximum(value * slope1, value * slope2));
      }
    }
  }
}

inline void to_bf16_map(const float* x, int positions, const Bfloat16Map& bf16, int block) {
  for (int p = 0; p < positions; ++p) {
    for (int lane = 0; lane < BLOCK; lane += LANES) {
      store_bf16(bf16, bf16_at(bf16, block, p) + lane, load(x + ptrdiff_t(p) * BLOCK + lane));
    }
  }
}

inline void mean(const float* x, int positions, float* out) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V total{};
    for (int p = 0; p < positions; ++p) total += load(x + ptrdiff_t(p) * BLOCK + lane);
    store(out + lane, activate(total / float(positions), Act::hardswish));
  }
}

}  // namespace mf::engine::MF_ISA
