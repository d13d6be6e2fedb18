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
  Operand cols;        // [samples][tokens][V * kWidth], neighbours side by side
  bool ahead;          // whether to ask memory for the columns after them
  float* partial_in;   // [R][V * kWidth], where the sample's sum goes on, or null
  float* partial_out;  // where it is kept for the sample's next tokens, or null: it is complete
  float* fisher;       // [R][V * kWidth]
  const float* mask;   // [R][V * kWidth], bits all ones or zeros; null: no scores
  float* scores;       // [samples][kWidth]
};

// Calls visit(r, v, offset of vector v in row r) for each vector of a tile, unrolled.
template <int R, int V, typename Visit>
inline void for_each_vector(Visit visit) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) visit(r, v, (r * V + v) * kWidth);
  }
}

// fisher += sum_n (sum_t rows[n,t] cols[n,t]^T)^2 over a tile of R rows and V vectors of columns,
// which are of type T. The sums over t are in registers; each element's terms are added in the
// order of t, then of n.
template <int R, int V, typename T>
void compute_tile(const Tile& tile) {
  const float* rows = tile.rows;
  for (int64_t n = 0; n < tile.samples; ++n) {
    const T* cols = static_cast<const T*>(tile.cols.data) + n * tile.cols.sample_stride;
    Vec sum[R][V];
    if (tile.partial_in) {
      for_each_vector<R, V>([&](int r, int v, int at) { sum[r][v] = load(tile.partial_in + at); });
    } else {
      for_each_vector<R, V>([&](int r, int v, int) { sum[r][v] = Vec{}; });
    }
    for (int64_t t = 0; t < tile.tokens; ++t, rows += R, cols += tile.cols.token_stride) {
      Vec col[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        col[v] = load_floats(cols + v * kWidth);
        if (tile.ahead) __builtin_prefetch(cols + (V + v) * kWidth, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec row = broadcast(rows[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(row, col[v], sum[r][v]);
      }
    }
    if (tile.partial_out) {
      for_each_vector<R, V>([&](int r, int v, int at) { store(tile.partial_out + at, sum[r][v]); });
      continue;
    }
    for_each_vector<R, V>([&](int r, int v, int at) {
      store(tile.fisher + at, multiply_add(sum[r][v], sum[r][v], load(tile.fisher + at)));
    });
    if (tile.mask) {
      Vec score = load(tile.scores + n * kWidth);
      for_each_vector<R, V>([&](int r, int v, int at) {
        score += keep(sum[r][v] * sum[r][v], load<VecBits>(tile.mask + at));
      });
      store(tile.scores + n * kWidth, score);
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <int R, typename T>
TileFunction with_vectors(int64_t vectors) {
  static_assert(kTileVectors <= 3);
  if constexpr (kTileVectors >= 3)
    if (vectors == 3) return compute_tile<R, 3, T>;
  return vectors == 2 ? compute_tile<R, 2, T> : compute_tile<R, 1, T>;
}

// compute_tile for a tile of any size up to kTileRows and kTileVectors.
template <typename T, int R = kTileRows>
TileFunction tile_function(int64_t rows, int64_t vectors) {
  if constexpr (R > 1)
    if (rows < R) return tile_function<T, R - 1>(rows, vectors);
  return with_vectors<R, T>(vectors);
}

}  // namespace
}  // namespace fishkern::fisher
