// Packing for the Fisher kernel: strided operands of any dtype become float32 panels.
//
// A panel holds `width` features of consecutive tokens: [tokens][width]. Wherever the tokens of the
// tensor lie, the inner loop of the kernel then reads memory from front to back.
#pragma once

#include <cstdint>

#include "cpu/simd/fisher.h"

namespace fishkern::fisher {
namespace {

// The tokens that are packed together: whole samples, or a part of one.
struct Chunk {
  int64_t sample, samples;
  int64_t token, tokens;
  bool first, last;  // the chunk holds the first, the last tokens of its samples

  int64_t size() const { return samples * tokens; }
};

// A packed panel of `width` features as an operand of the chunk's samples and tokens.
inline Operand packed(const float* panel, const Chunk& chunk, int64_t width) {
  return {panel, Dtype::float32, width, chunk.tokens * width, width, 1};
}

// Features [begin, begin + size) of the chunk's samples and tokens.
inline Operand part_of(Operand operand, const Chunk& chunk, int64_t begin, int64_t size) {
  advance(operand, begin * operand.stride + chunk.sample * operand.sample_stride +
                       chunk.token * operand.token_stride);
  operand.size = size;
  return operand;
}

// Packs features [begin, begin + size) as panels of kPanel features, the last one of what is left,
// rounded up to a multiple of kRound and filled with zeros.
template <typename T, int kPanel, int kRound>
void pack_as(const Operand& operand, const Chunk& chunk, int64_t begin, int64_t size, float* out) {
  const int64_t stride = operand.stride;
  const int64_t full = size / kPanel * kPanel, rest = size - full;
  const int64_t width = (rest + kRound - 1) / kRound * kRound;
  for (int64_t n = 0; n < chunk.samples; ++n) {
    for (int64_t t = 0; t < chunk.tokens; ++t) {
      const T* in = static_cast<const T*>(operand.data) + begin * stride +
                    (chunk.sample + n) * operand.sample_stride +
                    (chunk.token + t) * operand.token_stride;
      const int64_t k = n * chunk.tokens + t;
      if (stride == 1) {
        for (int64_t p = 0; p < full; p += kPanel) {
          float* row = out + p * chunk.size() + k * kPanel;
          for (int j = 0; j < kPanel; ++j) row[j] = to_float(in[p + j]);
        }
      } else {
        for (int64_t p = 0; p < full; p += kPanel) {
          float* row = out + p * chunk.size() + k * kPanel;
          for (int j = 0; j < kPanel; ++j) row[j] = to_float(in[(p + j) * stride]);
        }
      }
      float* row = out + full * chunk.size() + k * width;
      for (int64_t j = 0; j < rest; ++j) row[j] = to_float(in[(full + j) * stride]);
      for (int64_t j = rest; j < width; ++j) row[j] = 0.0f;
    }
  }
}

// The same where it is the tokens that lie one after another: each feature is read to its end.
template <typename T, int kPanel, int kRound>
void pack_across(const Operand& operand, const Chunk& chunk, int64_t begin, int64_t size,
                 float* out) {
  for (int64_t first = 0; first < size; first += kPanel) {
    const int64_t used = size - first < kPanel ? size - first : kPanel;
    const int64_t width = (used + kRound - 1) / kRound * kRound;
    float* const panel = out + first * chunk.size();
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t n = 0; n < chunk.samples; ++n) {
        const T* in = static_cast<const T*>(operand.data) + (begin + first + j) * operand.stride +
                      (chunk.sample + n) * operand.sample_stride + chunk.token;
        float* column = panel + n * chunk.tokens * width + j;
        if (j >= used) {
          for (int64_t t = 0; t < chunk.tokens; ++t) column[t * width] = 0.0f;
        } else if (width == kPanel) {
          for (int64_t t = 0; t < chunk.tokens; ++t) column[t * kPanel] = to_float(in[t]);
        } else {
          for (int64_t t = 0; t < chunk.tokens; ++t) column[t * width] = to_float(in[t]);
        }
      }
    }
  }
}

template <int kPanel, int kRound>
void pack(const Operand& operand, const Chunk& chunk, int64_t begin, int64_t size, float* out) {
  const bool across = operand.token_stride == 1 && operand.stride != 1 && chunk.tokens > 1;
  const auto run = [&]<typename T>(T) {
    across ? pack_across<T, kPanel, kRound>(operand, chunk, begin, size, out)
           : pack_as<T, kPanel, kRound>(operand, chunk, begin, size, out);
  };
  with_type(operand.dtype, run);
}

}  // namespace
}  // namespace fishkern::fisher
