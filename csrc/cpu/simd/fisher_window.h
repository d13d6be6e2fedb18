// Packing of a convolution's input for the Fisher kernel: patches are never written out elsewhere.
#pragma once

#include <cstdint>

#include "cpu/simd/fisher.h"
#include "cpu/simd/fisher_pack.h"

namespace fishkern::fisher {
namespace {

// A position of the output; the last dimension is the fastest.
struct Position {
  int64_t call, p[3];

  Position(const Window& window, int64_t token) {
    p[2] = token % window.outputs[2], token /= window.outputs[2];
    p[1] = token % window.outputs[1], token /= window.outputs[1];
    p[0] = token % window.outputs[0], call = token / window.outputs[0];
  }

  void next_row(const Window& window) {
    p[2] = 0;
    if (++p[1] < window.outputs[1]) return;
    p[1] = 0;
    if (++p[0] < window.outputs[0]) return;
    p[0] = 0;
    ++call;
  }
};

// An entry of the kernel: its channel, and its distance from the first entry.
struct Entry {
  int64_t channel, shift[3];

  Entry(const Window& window, int64_t feature) {
    for (int d = 2; d >= 0; --d) {
      shift[d] = feature % window.kernel[d] * window.dilation[d] - window.padding[d];
      feature /= window.kernel[d];
    }
    channel = feature;
  }
};

// What one entry of the kernel sees at the positions of one output row, p[2] and after.
template <typename T>
inline void pack_row(const Window& window, const Entry& entry, const T* in,
                     const Position& position, int64_t size, int64_t width, float* out) {
  const auto first_from = [&](int64_t i) {  // the first position that sees i or what comes after
    const int64_t k = i <= 0 ? 0 : (i + window.stride[2] - 1) / window.stride[2];
    return k < size ? k : size;
  };
  int64_t i[3], offset = 0;
  bool inside = true;
  for (int d = 0; d < 3; ++d) {
    i[d] = position.p[d] * window.stride[d] + entry.shift[d];
    offset += i[d] * window.steps[d];
    if (d < 2) inside = inside && i[d] >= 0 && i[d] < window.inputs[d];
  }
  const int64_t begin = first_from(-i[2]), end = inside ? first_from(window.inputs[2] - i[2]) : 0;
  const int64_t step = window.stride[2] * window.steps[2];
  int64_t k = 0;
  for (; k < begin; ++k) out[k * width] = 0.0f;
  for (; k < end; ++k) out[k * width] = to_float(in[offset + k * step]);
  for (; k < size; ++k) out[k * width] = 0.0f;
}

// As pack_as in fisher_pack.h.
template <typename T, int kPanel, int kRound>
void pack_window_as(const Side& side, const Chunk& chunk, int64_t begin, int64_t size, float* out) {
  const Window& window = *side.window;
  const Position start(window, chunk.token);
  for (int64_t first = 0; first < size; first += kPanel) {
    const int64_t used = size - first < kPanel ? size - first : kPanel;
    const int64_t width = (used + kRound - 1) / kRound * kRound;
    float* const panel = out + first * chunk.size();
    for (int64_t j = 0; j < used; ++j) {
      const Entry entry(window, begin + first + j);
      float* column = panel + j;
      for (int64_t n = 0; n < chunk.samples; ++n) {
        const T* const in = static_cast<const T*>(side.data) + entry.channel * window.channel_step +
                            (chunk.sample + n) * side.sample_stride;
        Position position = start;
        for (int64_t left = chunk.tokens; left > 0; position.next_row(window)) {
          const int64_t row = window.outputs[2] - position.p[2];
          const int64_t run = row < left ? row : left;
          pack_row(window, entry, in + position.call * window.call_step, position, run, width,
                   column);
          column += run * width;
          left -= run;
        }
      }
    }
    for (int64_t j = used; j < width; ++j)
      for (int64_t k = 0; k < chunk.size(); ++k) panel[k * width + j] = 0.0f;
  }
}

// Packs either kind of operand.
template <int kPanel, int kRound>
void pack_side(const Side& side, bool squared, const Chunk& chunk, int64_t begin, int64_t size,
               float* out) {
  if (!side.window) return pack<kPanel, kRound>(side, squared, chunk, begin, size, out);
  with_type(side.dtype, [&]<typename T>(T) {
    pack_window_as<T, kPanel, kRound>(side, chunk, begin, size, out);
  });
}

}  // namespace
}  // namespace fishkern::fisher
