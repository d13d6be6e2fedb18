// Moments in bfloat16 and in 8 bits: fishkern/backends/moments.py says how they are
// stored and why they are rounded at random. The same bits come out here.
//
// Everything is in an anonymous namespace: each object file keeps its own copy (simd/vector.h).
#pragma once

#include <cstdint>

#include "cpu/simd/adamw.h"

namespace fishkern::adamw {
namespace {

constexpr uint32_t kNotFinite = 255;  // the scale of a block that is NaN everywhere
constexpr uint32_t kDropped = 19;     // bits of float32's mantissa that are rounded away
constexpr uint32_t kExponentUnit = uint32_t{1} << 23;

// The largest exponent field of a first moment, which has a sign, and of a second one.
template <bool kSigned>
constexpr uint32_t kTop = kSigned ? 7 : 15;

// 32 random bits: the upper half for the first moment, the lower for the second.
inline uint32_t noise(uint32_t step, uint32_t entry) {
  uint32_t bits = entry + step * 0x9e3779b1u;
  bits = (bits ^ bits >> 16) * 0x85ebca6bu;
  bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
  return bits ^ bits >> 16;
}

template <bool kSigned>
inline float decode(uint8_t code, uint32_t scale) {
  const uint32_t magnitude = kSigned ? code & 0x7fu : code;
  const uint32_t field = magnitude >> 4;
  const int32_t mantissa = static_cast<int32_t>((magnitude & 15) | (field ? 16 : 0));
  const int32_t exponent =
      static_cast<int32_t>((field ? field : 1) + scale) - static_cast<int32_t>(kTop<kSigned> + 4);
  const uint32_t power = exponent > 0 ? static_cast<uint32_t>(exponent) << 23 : 0;
  const float value = static_cast<float>(mantissa) * float_of(power);
  return kSigned ? float_of(bits_of(value) | (code & 0x80u) << 24) : value;
}

// `up`: the odds of rounding away from zero, in units of 2^-16.
template <bool kSigned>
inline uint8_t encode(uint32_t bits, uint32_t scale, uint32_t up) {
  const uint32_t magnitude = bits & 0x7fffffffu, exponent = magnitude >> 23;
  const int32_t relative =
      static_cast<int32_t>(exponent + kTop<kSigned>) - static_cast<int32_t>(scale);
  const int32_t field = relative > 1 ? relative : 1;
  const uint32_t shift = kDropped + static_cast<uint32_t>(field - relative);
  const uint32_t within = shift < 31 ? shift : 31;
  const uint32_t mantissa = (magnitude & (kExponentUnit - 1)) | kExponentUnit;
  uint32_t code =
      (static_cast<uint32_t>(field - 1) << 4) + ((mantissa + (up << (within - 16))) >> within);
  code = shift > 31 || exponent == 0 ? 0 : code;
  if (kSigned) {
    code += bits >> 24 & 0x80u;
  } else {
    const uint32_t least = exponent > 0 ? 1 : 0;  // the update divides by its root
    code = code > least ? code : least;           // a maximum is what compilers vectorize
  }
  return static_cast<uint8_t>(code);
}

template <bool kSigned>
void read_block(const uint8_t* code, uint32_t scale, int64_t n, float* to) {
  if (scale == kNotFinite) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of(0x7fc00000u);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = decode<kSigned>(code[i], scale);
  }
}

template <bool kSigned>
uint8_t write_block(const float* from, const uint32_t* random, int64_t n, uint8_t* code) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(from[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  // The exponent of the largest value after rounding it up: no rounding leaves the range.
  const uint32_t exponent = (largest + (uint32_t{1} << kDropped) - 1) >> 23;
  if (exponent >= kNotFinite) {
    for (int64_t i = 0; i < n; ++i) code[i] = 0;
    return kNotFinite;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t up = kSigned ? random[i] >> 16 : random[i] & 0xffffu;
    code[i] = encode<kSigned>(bits_of(from[i]), exponent, up);
  }
  return static_cast<uint8_t>(exponent);
}

inline BFloat16 round_at_random(float x, uint32_t up) {
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : (bits_of(x) + up) >> 16)};
}

// The moments of the run's entries [begin, begin + n) in float32; begin is a multiple of
// kScaleBlock.
void read_moments(const Run& run, int64_t begin, int64_t n, float* m, float* v) {
  if (run.state_dtype == Dtype::bfloat16) {
    const auto* const m16 = static_cast<const BFloat16*>(run.exp_avg) + begin;
    const auto* const v16 = static_cast<const BFloat16*>(run.exp_avg_sq) + begin;
    for (int64_t i = 0; i < n; ++i) {
      m[i] = to_float(m16[i]);
      v[i] = to_float(v16[i]);
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kScaleBlock) {
    const int64_t at = begin + i, part = n - i < kScaleBlock ? n - i : kScaleBlock;
    read_block<true>(static_cast<const uint8_t*>(run.exp_avg) + at,
                     run.exp_avg_scale[at / kScaleBlock], part, m + i);
    read_block<false>(static_cast<const uint8_t*>(run.exp_avg_sq) + at,
                      run.exp_avg_sq_scale[at / kScaleBlock], part, v + i);
  }
}

void write_moments(const Run& run, uint32_t step, int64_t begin, int64_t n, const float* m,
                   const float* v) {
  uint32_t random[kScaleBlock];
  for (int64_t i = 0; i < n; i += kScaleBlock) {
    const int64_t at = begin + i, part = n - i < kScaleBlock ? n - i : kScaleBlock;
    const uint32_t entry = static_cast<uint32_t>(run.first + at);
    for (int64_t j = 0; j < part; ++j) random[j] = noise(step, entry + static_cast<uint32_t>(j));
    if (run.state_dtype == Dtype::bfloat16) {
      auto* const m16 = static_cast<BFloat16*>(run.exp_avg) + at;
      auto* const v16 = static_cast<BFloat16*>(run.exp_avg_sq) + at;
      for (int64_t j = 0; j < part; ++j) {
        m16[j] = round_at_random(m[i + j], random[j] >> 16);
        v16[j] = round_at_random(v[i + j], random[j] & 0xffffu);
      }
    } else {
      run.exp_avg_scale[at / kScaleBlock] =
          write_block<true>(m + i, random, part, static_cast<uint8_t*>(run.exp_avg) + at);
      run.exp_avg_sq_scale[at / kScaleBlock] =
          write_block<false>(v + i, random, part, static_cast<uint8_t*>(run.exp_avg_sq) + at);
    }
  }
}

}  // namespace
}  // namespace fishkern::adamw
