#include "cpu/simd/topk.h"

namespace fishkern::topk::FISHKERN_ISA {
namespace {

// Calls visit(i, key) for every key from low to high. Such keys are mostly few: runs without any
// are passed over by a loop that the compiler turns into vector instructions, and in the others
// they are first set apart without branches, whose outcome could not be predicted.
template <typename Visit>
inline void for_each_between(const float* scores, int64_t n, uint32_t low, uint32_t high,
                             Visit visit) {
  constexpr int64_t kRun = 64;
  int64_t begin = 0;
  for (; begin + kRun <= n; begin += kRun) {
    uint32_t found = 0;
    for (int64_t i = 0; i < kRun; ++i) found += key(scores[begin + i]) - low <= high - low;
    if (found == 0) continue;
    uint32_t keys[kRun];
    int32_t places[kRun];
    int32_t m = 0;
    for (int32_t i = 0; i < kRun; ++i) {
      keys[m] = key(scores[begin + i]);
      places[m] = i;
      m += keys[m] - low <= high - low;
    }
    for (int32_t j = 0; j < m; ++j) visit(begin + places[j], keys[j]);
  }
  for (; begin < n; ++begin) {
    const uint32_t k = key(scores[begin]);
    if (k - low <= high - low) visit(begin, k);
  }
}

}  // namespace

void histogram_high(const float* scores, int64_t n, uint32_t floor, int64_t* histograms) {
  for_each_between(scores, n, floor, UINT32_MAX, [&](int64_t i, uint32_t k) {
    ++histograms[(i % kHistograms) * kBins + (k >> 16)];
  });
}

void histogram_low(const float* scores, int64_t n, uint32_t high, int64_t* histograms) {
  for_each_between(scores, n, high << 16, high << 16 | 0xffff, [&](int64_t i, uint32_t k) {
    ++histograms[(i % kHistograms) * kBins + (k & 0xffff)];
  });
}

void count(const float* scores, int64_t n, uint32_t threshold, int64_t* above, int64_t* equal) {
  uint32_t found_above = 0, found_equal = 0;  // vectors of 32 bits: a run is shorter than 2^32
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t k = key(scores[i]);
    found_above += k > threshold;
    found_equal += k == threshold;
  }
  *above = found_above;
  *equal = found_equal;
}

void write(const float* scores, int64_t n, uint32_t threshold, int64_t ties, int64_t position,
           int64_t* out) {
  for_each_between(scores, n, threshold, UINT32_MAX, [&](int64_t i, uint32_t k) {
    if (k > threshold || ties-- > 0) *out++ = position + i;
  });
}

}  // namespace fishkern::topk::FISHKERN_ISA
