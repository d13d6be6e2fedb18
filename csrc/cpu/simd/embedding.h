// What csrc/cpu/embedding.cpp asks of the vectorised code: squared sums of the rows of grad_out
// that belong to one row of an embedding in one sample.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/operand.h"

namespace fishkern::embedding {

// A row of the embedding in a sample that has it: the tokens that took it.
struct Segment {
  int64_t row, sample;
  int64_t begin, end;  // of Problem::tokens
};

struct Problem {
  Operand grad;  // [samples, tokens, size]
  int64_t samples;
  const int64_t* tokens;
  const Segment* segments;
  int64_t num_segments;
  // fisher[row * row_stride + c * col_stride] += (sum over the segment's tokens of grad)^2.
  float* fisher;
  int64_t row_stride, col_stride;
  // Where given, scores[block * samples + n] += the block's part of sample n's squares, of those
  // where mask[row * mask_row_stride + c * mask_col_stride], if there is a mask.
  double* scores = nullptr;
  const bool* mask = nullptr;
  int64_t mask_row_stride = 0, mask_col_stride = 0;
};

// Columns are computed in blocks of this size; a block goes through the segments in their order.
inline constexpr int64_t kBlock = 64;

FISHKERN_DECLARE_FOR_EACH_ISA(void compute_block(const Problem& problem, int64_t block);)

}  // namespace fishkern::embedding
