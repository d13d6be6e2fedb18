// An operand of the kernels that read per-sample rows: [samples, tokens, size], strided, any dtype.
#pragma once

#include <cstdint>

namespace fishkern {

enum class Dtype { float32, bfloat16, float16 };

// Strides are in elements of dtype.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t size;
  int64_t sample_stride, token_stride, stride;
};

namespace {  // compiled for each instruction set

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return __builtin_bit_cast(float, uint32_t{value.bits} << 16);
}

// Written without branches, for the compiler to vectorise: the half's exponent and mantissa are
// read as a float32, whose exponent is then too small by 112. Infinity and NaN come out as 2^16 and
// above, and get the largest exponent.
inline float to_float(Float16 value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
}

// Calls run(T{}) with the C++ type of dtype.
template <typename Run>
inline void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{});
    case Dtype::bfloat16:
      return run(BFloat16{});
    case Dtype::float16:
      return run(Float16{});
  }
}

}  // namespace
}  // namespace fishkern
