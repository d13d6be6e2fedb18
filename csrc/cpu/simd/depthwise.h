// What csrc/cpu/depthwise.cpp asks of the vectorised code: a convolution's Fisher accumulation
// where each output sees one channel, so that a sample's gradient is a few sums over positions.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/window.h"

namespace fishkern::depthwise {

struct Problem {
  Operand grad;  // [samples, tokens, outputs]
  // The input [samples, call, channel, *], as the window says. Output o sees channel
  // o / multiplier.
  const void* x;
  Dtype x_dtype;
  int64_t x_sample_stride;
  Window window;
  int64_t samples, calls, multiplier;
  // fisher[o * row_stride + k * col_stride] += the squares; the mask is laid out by strides, too.
  float* fisher;
  int64_t row_stride, col_stride;
  const bool* mask = nullptr;
  int64_t mask_row_stride = 0, mask_col_stride = 0;
  // Where given, bias[o * bias_stride] += sum_n (sum_t grad[n,t,o])^2.
  float* bias = nullptr;
  int64_t bias_stride = 0;

  int64_t entries() const { return window.kernel[0] * window.kernel[1] * window.kernel[2]; }
};

FISHKERN_DECLARE_FOR_EACH_ISA(
    // The number of floats that add_outputs needs as scratch for `count` of them, aligned to 64
    // bytes.
    int64_t scratch_size(const Problem& problem, int64_t count);

    // Adds the squares of outputs [begin, end) to fisher and bias; where scores is given, scores[n]
    // += the sum of sample n's, of those in the mask.
    void add_outputs(const Problem& problem, int64_t begin, int64_t end, double* scores,
                     float* scratch);)

}  // namespace fishkern::depthwise
