// The dtypes of tensors, and their numbers as float32.
//
// Functions are in an anonymous namespace: each object file keeps its own copy, so that the linker
// can never put code for one instruction set where another one runs.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fishkern {

// uint8: moments in 8 bits (simd/moments.h), nothing else.
enum class Dtype : uint8_t { float32, bfloat16, float16, float64, uint8 };

constexpr int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::uint8 ? 1 : 2;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

// Written without branches, for the compiler to vectorise: the half's exponent and mantissa are
// read as a float32, whose exponent is then too small by 112. Infinity and NaN come out as 2^16 and
// above, and get the largest exponent.
inline float to_float(Float16 x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(scaled | special | uint32_t{x.bits & 0x8000u} << 16);
}

// To the nearest, ties to even.

inline void round_to(float& to, float x) { to = x; }

inline void round_to(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline void round_to(Float16& to, float x) {
#if defined(__F16C__)
  to.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  uint32_t result;
  if (rest > 0x7f800000) {  // NaN
    result = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to 65536 or more
    result = 0x7c00;
  } else if (rest < 0x38800000) {  // subnormal: let an addition round at the last bit
    result = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    result = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | result);
#endif
}

// Calls run(T{}) with the C++ type of dtype, one that kernels compute with in float32.
template <typename Run>
inline void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{});
    case Dtype::bfloat16:
      return run(BFloat16{});
    case Dtype::float16:
      return run(Float16{});
    case Dtype::float64:
    case Dtype::uint8:
      break;  // refused before
  }
}

}  // namespace
}  // namespace fishkern
