// Blocks of one or more Fisher accumulations, spread over threads.
#pragma once

#include <vector>

#include "cpu/simd/fisher.h"

namespace fishkern::fisher {

// Computes problems of the same shape (a convolution's groups). Where given, sample_scores[n *
// stride] += the sum of sample n's squares over all of them. Threads never share a block, and an
// element's arithmetic is the same in every block, so the result does not depend on the number of
// threads, bit for bit.
void compute(std::vector<Problem> problems, float* sample_scores, int64_t stride);

}  // namespace fishkern::fisher
