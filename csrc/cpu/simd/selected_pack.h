// Packing for selected entries: strided operands of any dtype, the tokens of a feature side by
// side.
#pragma once

#include <cstdint>

#include "cpu/simd/selected_grad.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fishkern::selected_grad {
namespace {

// Tokens that are read together, so that neighbouring features find them in cache.
constexpr int kStrip = 16;

#if defined(__SSE2__)
inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }

inline __m128 load4(const BFloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
}

inline __m128 load4(const Float16* p) {
  return _mm_setr_ps(to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3]));
}

// Four neighbouring features of a strip, transposed in registers.
template <typename T>
inline void pack_four(const T* const* in, int64_t at, float* out, int64_t distance) {
  for (int j = 0; j < kStrip; j += 4) {
    __m128 a = load4(in[j] + at), b = load4(in[j + 1] + at);
    __m128 c = load4(in[j + 2] + at), d = load4(in[j + 3] + at);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out + j, a);
    _mm_storeu_ps(out + j + distance, b);
    _mm_storeu_ps(out + j + 2 * distance, c);
    _mm_storeu_ps(out + j + 3 * distance, d);
  }
}
#else
template <typename T>
inline void pack_four(const T* const* in, int64_t at, float* out, int64_t distance) {
  for (int f = 0; f < 4; ++f)
    for (int j = 0; j < kStrip; ++j) out[f * distance + j] = to_float(in[j][at + f]);
}
#endif

template <typename T>
inline void pack_one(const T* const* in, int64_t size, int64_t at, float* out) {
  for (int64_t j = 0; j < size; ++j) out[j] = to_float(in[j][at]);
  for (int64_t j = size; j < kStrip; ++j) out[j] = 0.0f;
}

// Features [begin, end) of the side's list for the tokens [first, first + count), numbered over all
// samples: feature f at out + (f - begin) * distance, with zeros up to a multiple of kStrip.
template <typename T>
void pack_as(const Side& side, int64_t begin, int64_t end, int64_t tokens, int64_t first,
             int64_t count, int64_t distance, float* out) {
  const int64_t* const features = side.features;
  for (int64_t strip = 0; strip < count; strip += kStrip) {
    const T* in[kStrip];
    const int64_t size = count - strip < kStrip ? count - strip : kStrip;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t n = (first + strip + j) / tokens, t = (first + strip + j) % tokens;
      in[j] = static_cast<const T*>(side.data) + n * side.sample_stride + t * side.token_stride;
    }
    const bool whole = size == kStrip;
    float* to = out + strip;
    for (int64_t f = begin; f < end;) {
      const int64_t feature = features[f];
      const bool four = whole && side.stride == 1 && f + 4 <= end &&
                        features[f + 1] == feature + 1 && features[f + 2] == feature + 2 &&
                        features[f + 3] == feature + 3;
      if (four) {
        pack_four(in, feature, to, distance);
      } else if (whole) {
        pack_one(in, kStrip, feature * side.stride, to);  // a size known to the compiler
      } else {
        pack_one(in, size, feature * side.stride, to);
      }
      f += four ? 4 : 1;
      to += (four ? 4 : 1) * distance;
    }
  }
}

inline void pack(const Side& side, int64_t begin, int64_t end, int64_t tokens, int64_t first,
                 int64_t count, int64_t distance, float* out) {
  with_type(side.dtype, [&]<typename T>(T) {
    pack_as<T>(side, begin, end, tokens, first, count, distance, out);
  });
}

}  // namespace
}  // namespace fishkern::selected_grad
