// Sums of the lanes of vectors.
#pragma once

#include "cpu/simd/vector.h"

namespace fishkern {
namespace {

// sums[i] = the sum of the lanes of v[i], for four vectors at once: they are added up while they
// are transposed
inline void sum_lanes(const Vec* v, float* sums) {
#if defined(__AVX512F__)
  const auto pair = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512 ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
  const __m512 four =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const auto pair = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  };
  const __m256 ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
  const __m256 four =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
#else
  for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

}  // namespace
}  // namespace fishkern
