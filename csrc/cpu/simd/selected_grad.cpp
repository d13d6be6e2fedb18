// Selected entries of a product of matrices: packed operands, and a dot product for each entry.
#include "cpu/simd/selected_grad.h"

#include "cpu/simd/lanes.h"
#include "cpu/simd/selected_pack.h"
#include "cpu/simd/vector.h"

namespace fishkern::selected_grad::FISHKERN_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Entries that are computed together: as many sums as hide the latency of multiply-add.
constexpr int kGroup = 8;

// *out[e] += the sum of the lanes of sums[e].
inline void add_lanes(const Vec* sums, float* const* out, int count) {
  float totals[kGroup];
  for (int e = 0; e < kGroup; e += 4) sum_lanes(sums + e, totals + e);
  for (int e = 0; e < count; ++e) *out[e] += totals[e];
}

// Dot products, over so many tokens, of a row with kGroup columns.
inline void dot_row(const float* row, const float* const* cols, int64_t tokens, Vec* sums) {
  for (int e = 0; e < kGroup; ++e) sums[e] = Vec{};
  for (int64_t t = 0; t < tokens; t += kWidth) {
    const Vec r = load(row + t);
#pragma GCC unroll 8
    for (int e = 0; e < kGroup; ++e) sums[e] = multiply_add(r, load(cols[e] + t), sums[e]);
  }
}

// Entries of several rows, which are gathered until there are kGroup of them.
struct Mixed {
  const float *rows[kGroup], *cols[kGroup];
  float* out[kGroup];
  int count = 0;

  void add(const float* row, const float* col, float* to, int64_t tokens) {
    rows[count] = row, cols[count] = col, out[count] = to;
    if (++count == kGroup) flush(tokens);
  }

  void flush(int64_t tokens) {
    if (count == 0) return;
    for (int e = count; e < kGroup; ++e) rows[e] = rows[0], cols[e] = cols[0];
    Vec sums[kGroup];
    for (int e = 0; e < kGroup; ++e) sums[e] = Vec{};
    for (int64_t t = 0; t < tokens; t += kWidth) {
#pragma GCC unroll 8
      for (int e = 0; e < kGroup; ++e)
        sums[e] = multiply_add(load(rows[e] + t), load(cols[e] + t), sums[e]);
    }
    add_lanes(sums, out, count);
    count = 0;
  }
};

// From one packed feature to the next: not a power of two, which would crowd into few cache sets.
inline int64_t distance(const Problem& problem) { return problem.chunk + kStrip; }

}  // namespace

int64_t scratch_size(const Problem& problem) {
  return (problem.cols.num_features + kBlockRows) * distance(problem);
}

void compute_rows(const Problem& problem, int64_t begin, int64_t end, float* scratch) {
  const int64_t all = problem.samples * problem.tokens;
  const int64_t num_cols = problem.cols.num_features, step = distance(problem);
  float* const cols = scratch;
  float* const rows = scratch + num_cols * step;
  for (int64_t first = 0; first < all; first += problem.chunk) {
    const int64_t count = min(problem.chunk, all - first), padded = round_up(count, kStrip);
    pack(problem.cols, 0, num_cols, problem.tokens, first, count, step, cols);
    for (int64_t block = begin; block < end; block += kBlockRows) {
      const int64_t last = min(block + kBlockRows, end);
      pack(problem.rows, block, last, problem.tokens, first, count, step, rows);
      Mixed mixed;
      for (int64_t r = block; r < last; ++r) {
        const float* const row = rows + (r - block) * step;
        const auto col = [&](int64_t e) { return cols + problem.entry_cols[e] * step; };
        const auto out = [&](int64_t e) { return problem.out + e * problem.out_stride; };
        int64_t e = problem.row_begin[r];
        for (; e + kGroup <= problem.row_begin[r + 1]; e += kGroup) {
          const float* group[kGroup];
          float* to[kGroup];
          Vec sums[kGroup];
          for (int i = 0; i < kGroup; ++i) group[i] = col(e + i), to[i] = out(e + i);
          dot_row(row, group, padded, sums);
          add_lanes(sums, to, kGroup);
        }
        for (; e < problem.row_begin[r + 1]; ++e) mixed.add(row, col(e), out(e), padded);
      }
      mixed.flush(padded);
    }
  }
}

}  // namespace fishkern::selected_grad::FISHKERN_ISA
