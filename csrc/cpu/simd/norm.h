// What csrc/cpu/norm.cpp asks of the vectorised code: per-sample sums over tokens of grad_out and
// of grad_out x_hat, squared.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/operand.h"

namespace fishkern::norm {

// One of the two parameters: the weight, whose terms are grad_out x_hat, or the bias.
struct Parameter {
  bool wanted = false;
  // Which of its squares count in the scores; null: all.
  const bool* mask = nullptr;
  int64_t mask_stride = 0;
};

struct Problem {
  Operand grad, x_hat;  // [samples, tokens, size]; x_hat only where there is a weight
  int64_t samples, tokens;
  Parameter weight, bias;
  // Where given, scores[n * score_stride] += the sum of sample n's squares.
  float* scores = nullptr;
  int64_t score_stride = 0;
};

FISHKERN_DECLARE_FOR_EACH_ISA(
    // The number of floats that add_samples needs as scratch.
    int64_t scratch_size(const Problem& problem);

    // Adds the squares of samples [begin, end) to weight[size] and bias[size], as far as wanted.
    void add_samples(const Problem& problem, int64_t begin, int64_t end, float* weight, float* bias,
                     float* scratch);)

}  // namespace fishkern::norm
