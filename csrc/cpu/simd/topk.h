// The three passes of the exact top-k (csrc/cpu/topk.cpp), each over one contiguous run of scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/capability.h"

namespace fishkern::topk {

// Half a key is one radix digit: two digits make a float32.
inline constexpr int64_t kBins = 1 << 16;

// Equal neighbours go to different histograms: increments of one counter wait for each other.
inline constexpr int64_t kHistograms = 2;

// Maps floats to integers of the same order. Adding zero makes -0 equal to +0; NaN ranks beyond
// infinity, on the side of its sign bit. Static: every instruction set keeps its own.
static inline uint32_t key(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

FISHKERN_DECLARE_FOR_EACH_ISA(
    // histogram[i % kHistograms][high half of the key] += 1 for every key that is at least floor.
    void histogram_high(const float* scores, int64_t n, uint32_t floor, int64_t* histograms);

    // histogram[i % kHistograms][low half of the key] += 1 where the high half equals `high`.
    void histogram_low(const float* scores, int64_t n, uint32_t high, int64_t* histograms);

    // The number of keys above the threshold, and of those equal to it.
    void count(const float* scores, int64_t n, uint32_t threshold, int64_t* above, int64_t* equal);

    // Writes position + i, in order, for every key above the threshold and for the first `ties`
    // of those equal to it.
    void write(const float* scores, int64_t n, uint32_t threshold, int64_t ties, int64_t position,
               int64_t* out);)

}  // namespace fishkern::topk
