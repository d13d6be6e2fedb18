// What csrc/cpu/fisher_blocks.cpp asks of the vectorised code:
// blocks of sum_n (sum_t a[n,t] b[n,t]^T)^2.
//
// Letters: n sample, t token, r row and c column of the result. Of the two operands, `rows` is read
// one number at a time and `cols` a vector at a time: cols should be the longer one. Which of them
// is the layer's input does not matter here.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/window.h"

namespace fishkern::fisher {

// One of the two operands.
struct Side : Operand {
  // Where given, bias[r * bias_stride] += sum_n (sum_t operand[n,t,r])^2.
  float* bias = nullptr;
  int64_t bias_stride = 0;
  // Where given, how the operand is read, in place of its token_stride and stride.
  const Window* window = nullptr;
};

struct Problem {
  Side rows, cols;
  int64_t samples, tokens;
  // fisher[r * row_stride + c * col_stride] += sum_n (sum_t rows[n,t,r] cols[n,t,c])^2.
  float* fisher;
  int64_t row_stride, col_stride;
  // Where given, scores[block * samples + n] = the block's part of the sum of the squares, of
  // those where mask[r * mask_row_stride + c * mask_col_stride], if there is a mask.
  double* scores = nullptr;
  const bool* mask = nullptr;
  int64_t mask_row_stride = 0, mask_col_stride = 0;
  // The result is computed in blocks of this size, numbered row by row.
  int64_t block_rows = 0, block_cols = 0;
  // Whether columns are read where they lie, side by side, instead of being packed.
  bool in_place = false;

  int64_t num_row_blocks() const { return blocks(rows.size, block_rows); }
  int64_t num_col_blocks() const { return blocks(cols.size, block_cols); }
  int64_t num_blocks() const { return num_row_blocks() * num_col_blocks(); }

 private:
  // At least one, since there may be a bias without a single weight.
  static int64_t blocks(int64_t size, int64_t block) {
    return size == 0 ? 1 : (size + block - 1) / block;
  }
};

FISHKERN_DECLARE_FOR_EACH_ISA(
    // The number of floats that compute_block needs as scratch, aligned to 64 bytes.
    int64_t scratch_size(const Problem& problem);

    // Computes one block of the result and adds it to the outputs.
    void compute_block(const Problem& problem, int64_t block, float* scratch);)

}  // namespace fishkern::fisher
