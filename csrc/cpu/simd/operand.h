// An operand of the kernels that read per-sample rows: [samples, tokens, size], strided, any dtype.
#pragma once

#include <cstdint>

#include "cpu/simd/dtypes.h"

namespace fishkern {

// Strides are in elements of dtype.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t size;
  int64_t sample_stride, token_stride, stride;
};

namespace {  // compiled for each instruction set

// Skips this many elements.
inline void advance(Operand& operand, int64_t elements) {
  operand.data = static_cast<const char*>(operand.data) + elements * bytes_of(operand.dtype);
}

}  // namespace
}  // namespace fishkern
