// What csrc/cpu/selected_grad.cpp asks of the vectorised code: selected entries of a^T b, where a
// and b have the same tokens, each as a dot product over the tokens.
//
// Vectors run along the tokens, so that the cost of an entry is that of one of a dense product,
// wherever it lies: the operands are packed with the tokens of a feature side by side, only those
// features that some entry needs, and a chunk of tokens at a time, so that they stay in cache.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/operand.h"

namespace fishkern::selected_grad {

// Features of an operand that are needed, in the order in which they are packed.
struct Side : Operand {
  const int64_t* features;
  int64_t num_features;
};

struct Problem {
  Side rows, cols;  // grad_out and x
  int64_t samples, tokens;
  // Row r (of the packed ones) has the entries row_begin[r] .. row_begin[r + 1]; entry e multiplies
  // it by the packed column entry_cols[e]. out[e * out_stride] += the product.
  const int64_t* row_begin;
  const int32_t* entry_cols;
  float* out;
  int64_t out_stride;
  // Tokens that are packed together: a multiple of 16.
  int64_t chunk;
};

// Rows are packed so many at a time.
inline constexpr int64_t kBlockRows = 128;

FISHKERN_DECLARE_FOR_EACH_ISA(
    // The number of floats that compute_rows needs as scratch, aligned to 64 bytes.
    int64_t scratch_size(const Problem& problem);

    // Adds to the entries of the rows [begin, end).
    void compute_rows(const Problem& problem, int64_t begin, int64_t end, float* scratch);)

}  // namespace fishkern::selected_grad
