// What happens to tokens between their linear layers, and the small passes over maps. No include guard: once per
// instruction set.

namespace mf::engine::MF_LEVEL {

// Every token of x [rows][D] to mean 0 and variance 1, times weight, plus bias
inline void layer_norm(float* x, const float* weight, const float* bias, int D, int rows) {
  for (int m = 0; m < rows; ++m, x += D) {
    V total{};
    for (int c = 0; c < D; c += LANES) total += load(x + c);
    const float mean = sum_lanes(total) / D;
    V squares{};
    for (int c = 0; c < D; c += LANES) {
      const V difference = load(x + c) - mean;
      squares += difference * difference;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / D + 1e-5f);
    for (int c = 0; c < D; c += LANES) store(x + c, (load(x + c) - mean) * scale * load(weight + c) + load(bias + c));
  }
}

// out[i] = sum over j of softmax over j (q[i] . tokens[j]) tokens[j], head by head; q carries scale and log2(e)
inline void former_attention(const float* q, const float* tokens, float* out, int D, int M, int rows) {
  const int E = D / FORMER_HEADS;
  for (int first = 0; first < D; first += E) {
    for (int i = 0; i < rows; ++i) {
      float weights[BLOCK];
      for (float& weight : weights) weight = -3.0e38f;
      float top = -3.0e38f;
      for (int j = 0; j < M; ++j) {
        V dot{};
        for (int c = first; c < first + E; c += LANES) dot += load(q + i * D + c) * load(tokens + j * D + c);
        weights[j] = sum_lanes(dot);
        top = weights[j] > top ? weights[j] : top;
      }
      float total = 0;
      for (int lane = 0; lane < BLOCK; lane += LANES) {
        const V power = exp2(load(weights + lane) - top);
        store(weights + lane, power);
        total += sum_lanes(power);
      }
      for (int c = first; c < first + E; c += LANES) {
        V sum{};
        for (int j = 0; j < M; ++j) sum += load(tokens + j * D + c) * weights[j];
        store(out + i * D + c, sum / total);
      }
    }
  }
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

}  // namespace mf::engine::MF_LEVEL
