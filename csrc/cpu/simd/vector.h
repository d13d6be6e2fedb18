// Vectors of float32 in the width of the instruction set that this file is compiled for.
//
// Everything is in an anonymous namespace: each object file keeps its own copy, so that the linker
// can never put code for one instruction set where another one runs.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/dtypes.h"

#if defined(__SSE2__)
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

// Scratch memory is aligned to this many bytes. Vectors may lie anywhere: on a boundary they are
// read in one go.
constexpr int64_t kAlignment = 64;

template <typename V = Vec>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

#if defined(__AVX2__) && !defined(__AVX512F__)
// All ones in the first n of its lanes.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n < kWidth numbers, zeros behind them; no memory behind them is touched.
inline Vec load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p);
#elif defined(__AVX2__)
  return (Vec)_mm256_maskload_ps(p, first_lanes(n));
#else
  Vec v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

inline void store_first(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

// A vector of any dtype's numbers.

inline Vec load_floats(const float* p) { return load(p); }

inline Vec load_floats(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

inline Vec load_floats(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load<__m128i>(p));
#else
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

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
