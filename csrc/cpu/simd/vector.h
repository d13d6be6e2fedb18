// Vectors of float32 in the width of the instruction set that this file is compiled for.
//
// Everything is in an anonymous namespace: each object file keeps its own copy, so that the linker
// can never put code for one instruction set where another one runs.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fishkern {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth), may_alias));
using VecBits = int32_t __attribute__((vector_size(4 * kWidth), may_alias));

// Memory that Vec is read from and written to is aligned to this many bytes.
constexpr int64_t kAlignment = 64;

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline VecBits load_bits(const float* p) { return *reinterpret_cast<const VecBits*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// a * b + c, rounded once where the CPU can.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}

// v where the bits of mask are all ones, +0 where they are all zeros (also if v is NaN there).
inline Vec keep(Vec v, VecBits mask) {
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(v) & mask);
}

}  // namespace
}  // namespace fishkern
