// Per-sample sums by feature: whole rows are read from front to back, some tokens at a time, so
// that the sums, which stay in the nearest cache, are read and written once for all of these.
#include "cpu/simd/norm.h"

namespace fishkern::norm::FISHKERN_ISA {
namespace {

constexpr int64_t kTokens = 4;

// The features of one token as float32: where they are, or converted into `room`.
const float* row(const Operand& operand, int64_t n, int64_t t, float* room) {
  const int64_t offset = n * operand.sample_stride + t * operand.token_stride;
  if (operand.dtype == Dtype::float32 && operand.stride == 1)
    return static_cast<const float*>(operand.data) + offset;
  with_type(operand.dtype, [&]<typename T>(T) {
    const T* in = static_cast<const T*>(operand.data) + offset;
    if (operand.stride == 1) {
      for (int64_t c = 0; c < operand.size; ++c) room[c] = to_float(in[c]);
    } else {
      for (int64_t c = 0; c < operand.size; ++c) room[c] = to_float(in[c * operand.stride]);
    }
  });
  return room;
}

// weight += sum_k g[k] x[k] and bias += sum_k g[k], of kCount tokens, in their order.
template <bool kWeight, bool kBias, int kCount>
void add_tokens(const float* const* g, const float* const* x, int64_t size,
                float* __restrict weight, float* __restrict bias) {
  for (int64_t c = 0; c < size; ++c) {
    if constexpr (kWeight) {
      float sum = weight[c];
      for (int k = 0; k < kCount; ++k) sum += g[k][c] * x[k][c];
      weight[c] = sum;
    }
    if constexpr (kBias) {
      float sum = bias[c];
      for (int k = 0; k < kCount; ++k) sum += g[k][c];
      bias[c] = sum;
    }
  }
}

// total += sum^2; the sum of the squares that count in the scores.
double add_squares(const Parameter& parameter, int64_t size, const float* sum, float* total,
                   bool scored) {
  for (int64_t c = 0; c < size; ++c) total[c] += sum[c] * sum[c];
  double score = 0.0;
  for (int64_t c = 0; scored && c < size; ++c)
    if (!parameter.mask || parameter.mask[c * parameter.mask_stride]) score += sum[c] * sum[c];
  return score;
}

template <bool kWeight, bool kBias>
void add(const Problem& problem, int64_t begin, int64_t end, float* weight, float* bias,
         float* scratch) {
  const int64_t size = problem.grad.size;
  float *weight_sum = scratch, *bias_sum = scratch + size, *room = scratch + 2 * size;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t c = 0; c < 2 * size; ++c) scratch[c] = 0.0f;
    const float *g[kTokens], *x[kTokens];
    for (int64_t t = 0; t < problem.tokens; t += kTokens) {
      const int64_t count = problem.tokens - t < kTokens ? problem.tokens - t : kTokens;
      for (int64_t k = 0; k < count; ++k) {
        g[k] = row(problem.grad, n, t + k, room + k * size);
        if constexpr (kWeight) x[k] = row(problem.x_hat, n, t + k, room + (kTokens + k) * size);
      }
      if (count == kTokens) {
        add_tokens<kWeight, kBias, kTokens>(g, x, size, weight_sum, bias_sum);
      } else {
        for (int64_t k = 0; k < count; ++k)
          add_tokens<kWeight, kBias, 1>(g + k, x + k, size, weight_sum, bias_sum);
      }
    }
    const bool scored = problem.scores != nullptr;
    double score = 0.0;
    if constexpr (kWeight) score += add_squares(problem.weight, size, weight_sum, weight, scored);
    if constexpr (kBias) score += add_squares(problem.bias, size, bias_sum, bias, scored);
    if (scored) problem.scores[n * problem.score_stride] += static_cast<float>(score);
  }
}

}  // namespace

int64_t scratch_size(const Problem& problem) { return (2 + 2 * kTokens) * problem.grad.size; }

void add_samples(const Problem& problem, int64_t begin, int64_t end, float* weight, float* bias,
                 float* scratch) {
  if (problem.weight.wanted && problem.bias.wanted)
    add<true, true>(problem, begin, end, weight, bias, scratch);
  else if (problem.weight.wanted)
    add<true, false>(problem, begin, end, weight, bias, scratch);
  else
    add<false, true>(problem, begin, end, weight, bias, scratch);
}

}  // namespace fishkern::norm::FISHKERN_ISA
