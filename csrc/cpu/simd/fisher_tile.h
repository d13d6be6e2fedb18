// The innermost part of the Fisher kernel: one tile of the result, held in registers.
#pragma once

#include "cpu/simd/fisher.h"
#include "cpu/simd/vector.h"

namespace fishkern::fisher {
namespace {

// The largest tile: its sums, a vector of columns and a broadcast row fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 3;  // of 16
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // of 16, and products need some
#endif
constexpr int kTileCols = kTileVectors * kWidth;

struct Tile {
  int64_t samples, tokens;
  const float* rows;   // [samples][tokens][R]
  const float* cols;   // [samples][tokens][V * kWidth]
  float* partial_in;   // [R][V * kWidth], where the sample's sum goes on, or null
  float* partial_out;  // where it is kept for the sample's next tokens, or null: it is complete
  float* fisher;       // [R][V * kWidth]
  bool squared;        // the operands are: the complete sum is not to be squared
  const float* mask;   // [R][V * kWidth], bits all ones or zeros; null: no scores
  float* scores;       // [samples][kWidth]
};

// fisher += sum_n (sum_t rows[n,t] cols[n,t]^T)^2 over a tile of R rows and V vectors of columns.
// The sums over t are in registers; each element's terms are added in the order of t, then of n.
template <int R, int V>
void compute_tile(const Tile& tile) {
  const float* rows = tile.rows;
  const float* cols = tile.cols;
  for (int64_t n = 0; n < tile.samples; ++n) {
    Vec sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[r][v] = tile.partial_in ? load(tile.partial_in + (r * V + v) * kWidth) : Vec{};
    for (int64_t t = 0; t < tile.tokens; ++t, rows += R, cols += V * kWidth) {
      Vec col[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) col[v] = load(cols + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec row = broadcast(rows[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(row, col[v], sum[r][v]);
      }
    }
    if (tile.partial_out) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(tile.partial_out + (r * V + v) * kWidth, sum[r][v]);
      continue;
    }
    Vec score{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int at = (r * V + v) * kWidth;
        const Vec f = load(tile.fisher + at);
        store(tile.fisher + at,
              tile.squared ? f + sum[r][v] : multiply_add(sum[r][v], sum[r][v], f));
        if (tile.mask) {
          const auto mask = *reinterpret_cast<const VecBits*>(tile.mask + at);
          score += keep(sum[r][v] * sum[r][v], mask);
        }
      }
    }
    if (tile.mask) store(tile.scores + n * kWidth, load(tile.scores + n * kWidth) + score);
  }
}

using TileFunction = void (*)(const Tile&);

template <int R>
TileFunction with_vectors(int64_t vectors) {
  static_assert(kTileVectors <= 3);
  if constexpr (kTileVectors >= 3)
    if (vectors == 3) return compute_tile<R, 3>;
  return vectors == 2 ? compute_tile<R, 2> : compute_tile<R, 1>;
}

// compute_tile for a tile of any size up to kTileRows and kTileVectors.
template <int R = kTileRows>
TileFunction tile_function(int64_t rows, int64_t vectors) {
  if constexpr (R > 1)
    if (rows < R) return tile_function<R - 1>(rows, vectors);
  return with_vectors<R>(vectors);
}

}  // namespace
}  // namespace fishkern::fisher
