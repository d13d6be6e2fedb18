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

// An entry of the kernel: its channel, its distance from the first entry, and the range of
// positions in the last dimension where it is inside the input.
struct Entry {
  int64_t channel, shift[3], begin, end;

  Entry(const Window& window, int64_t feature) {
    for (int d = 2; d >= 0; --d) {
      shift[d] = feature % window.kernel[d] * window.dilation[d] - window.padding[d];
      feature /= window.kernel[d];
    }
    channel = feature;
    begin = first_from(-shift[2], window.stride[2]);
    end = first_from(window.inputs[2] - shift[2], window.stride[2]);
  }

  // The first position that sees element i of the input, or what comes after.
  static int64_t first_from(int64_t i, int64_t stride) { return i <= 0 ? 0 : (i - 1) / stride + 1; }
};

// What one entry of the kernel sees at the positions of one output row, p[2] and after.
template <typename T, int kWidthKnown>
inline void pack_row(const Window& window, const Entry& entry, const T* in,
                     const Position& position, int64_t size, int64_t any_width, float* out) {
  const int64_t width = kWidthKnown ? kWidthKnown : any_width;
  int64_t offset = 0;
  bool inside = true;
  for (int d = 0; d < 3; ++d) {
    const int64_t i = position.p[d] * window.stride[d] + entry.shift[d];
    offset += i * window.steps[d];
    if (d < 2) inside = inside && i >= 0 && i < window.inputs[d];
  }
  const auto clamp = [size](int64_t k) { return k < 0 ? 0 : k < size ? k : size; };
  const int64_t begin = clamp(entry.begin - position.p[2]);
  const int64_t end = inside ? clamp(entry.end - position.p[2]) : 0;
  const int64_t step = window.stride[2] * window.steps[2];
  int64_t k = 0;
  for (; k < begin; ++k) out[k * width] = 0.0f;
  if (step == 1) {
    for (; k < end; ++k) out[k * width] = to_float(in[offset + k]);
  } else {
    for (; k < end; ++k) out[k * width] = to_float(in[offset + k * step]);
  }
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
          const T* const call = in + position.call * window.call_step;
          width == kPanel ? pack_row<T, kPanel>(window, entry, call, position, run, width, column)
                          : pack_row<T, 0>(window, entry, call, position, run, width, column);
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
void pack_side(const Side& side, const Chunk& chunk, int64_t begin, int64_t size, float* out) {
  if (!side.window) return pack<kPanel, kRound>(side, chunk, begin, size, out);
  with_type(side.dtype, [&]<typename T>(T) {
    pack_window_as<T, kPanel, kRound>(side, chunk, begin, size, out);
  });
}

}  // namespace
}  // namespace fishkern::fisher
