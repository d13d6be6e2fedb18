// Fisher accumulation of convolutions in which each output sees one channel, spread over threads.
#pragma once

#include "cpu/simd/depthwise.h"

namespace fishkern::depthwise {

// Where given, scores[n * stride] += the sum of sample n's squares. Threads share out outputs, not
// samples or positions: the result does not depend on their number, bit for bit.
void compute(const Problem& problem, float* scores, int64_t stride);

}  // namespace fishkern::depthwise
