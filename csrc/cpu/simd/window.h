// How a convolution's input is read as the operand of a product: [samples, tokens, size].
#pragma once

#include <cstdint>

namespace fishkern {

// A token is a position (call, p0, p1, p2) of the output, a feature an entry (channel, k0, k1, k2)
// of the kernel, each numbered in this order; missing spatial dimensions come first and have size
// 1. The element is input[call, channel, i0, i1, i2] with i = p * stride - padding + k * dilation,
// or zero where that is outside. Steps are in elements of the input.
struct Window {
  int64_t inputs[3] = {1, 1, 1}, outputs[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
  int64_t call_step = 0, channel_step = 0, steps[3] = {0, 0, 0};
};

}  // namespace fishkern
