// One block of the Fisher accumulation, in the manner of a BLIS matrix product.
//
// A block's part of both operands is packed chunk by chunk; a chunk holds some whole samples, or,
// if a sample has many tokens, a part of one. A tile of the block then runs over all samples of the
// chunk while its panels are in the nearest cache. The block is summed in scratch memory and added
// to the output in the end, so that the output's layout matters only there.
#include "cpu/simd/fisher.h"

#include "cpu/simd/fisher_pack.h"
#include "cpu/simd/fisher_tile.h"
#include "cpu/simd/fisher_window.h"

namespace fishkern::fisher::FISHKERN_ISA {
namespace {

// Tokens packed together: two panels of so many fit into a first-level cache of 32 KiB.
constexpr int64_t kChunkTokens = 128;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Sums of an operand over the tokens of each sample, squared and added up: the bias.
struct BiasSums {
  float* sum;    // [size] of the sample under way
  float* total;  // [size] over samples

  // A panel of the chunk, which begins at this feature.
  template <int kPanel>
  void add(const Operand& panel, const Chunk& chunk, int64_t begin) const {
    with_type(panel.dtype, [&]<typename T>(T) {
      if (panel.size == kPanel) {
        add_as<T, kPanel>(panel, chunk, begin, kPanel);  // a width known to the compiler
      } else {
        add_as<T, kPanel>(panel, chunk, begin, panel.size);
      }
    });
  }

  template <typename T, int kPanel>
  [[gnu::always_inline]] inline void add_as(const Operand& panel, const Chunk& chunk, int64_t begin,
                                            int64_t width) const {
    for (int64_t n = 0; n < chunk.samples; ++n) {
      const T* in = static_cast<const T*>(panel.data) + n * panel.sample_stride;
      float s[kPanel];
      for (int64_t j = 0; j < width; ++j) s[j] = chunk.first ? 0.0f : sum[begin + j];
      for (int64_t t = 0; t < chunk.tokens; ++t, in += panel.token_stride)
        for (int64_t j = 0; j < width; ++j) s[j] += to_float(in[j]);
      if (chunk.last) {
        for (int64_t j = 0; j < width; ++j) total[begin + j] += s[j] * s[j];
      } else {
        for (int64_t j = 0; j < width; ++j) sum[begin + j] = s[j];
      }
    }
  }

  void write(const Side& side, int64_t begin, int64_t size) const {
    for (int64_t j = 0; j < size; ++j) side.bias[(begin + j) * side.bias_stride] += total[j];
  }
};

// The block of a problem that compute_block works on, and its scratch memory.
class Block {
 public:
  Block(const Problem& problem, int64_t index, float* scratch)
      : problem_(problem),
        index_(index),
        row_(index / problem.num_col_blocks() * problem.block_rows),
        col_(index % problem.num_col_blocks() * problem.block_cols),
        rows_(min(problem.block_rows, problem.rows.size - row_)),
        cols_(min(problem.block_cols, problem.cols.size - col_)),
        padded_cols_(round_up(cols_, kWidth)),
        in_place_cols_(problem.in_place ? cols_ / kTileCols * kTileCols : 0) {
    const auto take = [&](int64_t size) {
      float* taken = scratch + used_;
      used_ += round_up(size, kAlignment / 4);
      return taken;
    };
    const int64_t area =
        round_up(problem.block_rows, kTileRows) * round_up(problem.block_cols, kWidth);
    const int64_t tokens = chunk_size();
    fisher_ = take(area);
    packed_rows_ = take(tokens * problem.block_rows);
    packed_cols_ =
        take(tokens * (problem.in_place ? kTileCols : round_up(problem.block_cols, kWidth)));
    if (problem.tokens > kChunkTokens) partial_ = take(area);
    if (problem.scores) mask_ = take(area), scores_ = take(tokens * kWidth);
    const int64_t bias = problem.rows.bias   ? problem.block_rows
                         : problem.cols.bias ? round_up(problem.block_cols, kWidth)
                                             : 0;
    bias_ = {take(bias), take(bias)};
  }

  int64_t scratch_size() const { return used_; }

  void compute() {
    const bool row_bias = problem_.rows.bias && col_ == 0,
               col_bias = problem_.cols.bias && row_ == 0;
    fill(fisher_, rows_ * padded_cols_);
    if (row_bias) fill(bias_.total, rows_);
    if (col_bias) fill(bias_.total, padded_cols_);
    if (mask_) pack_mask();
    const int64_t parts = ceil_div(problem_.tokens, kChunkTokens);
    const int64_t tokens = ceil_div(problem_.tokens, parts);
    const int64_t samples = parts > 1 ? 1 : chunk_size() / tokens;
    for (int64_t n = 0; n < problem_.samples; n += samples) {
      for (int64_t t = 0; t < problem_.tokens; t += tokens) {
        const Chunk chunk{n,      min(samples, problem_.samples - n),
                          t,      min(tokens, problem_.tokens - t),
                          t == 0, t + tokens >= problem_.tokens};
        pack_side<kTileRows, 1>(problem_.rows, chunk, row_, rows_, packed_rows_);
        pack_side<kTileCols, kWidth>(problem_.cols, chunk, col_ + in_place_cols_,
                                     cols_ - in_place_cols_, packed_cols_);
        compute_chunk(chunk);
        for (int64_t r = 0; row_bias && r < rows_; r += kTileRows)
          bias_.add<kTileRows>(row_panel(chunk, r), chunk, r);
        for (int64_t c = 0; col_bias && c < cols_; c += kTileCols)
          bias_.add<kTileCols>(col_panel(chunk, c), chunk, c);
      }
    }
    add_to_output();
    if (row_bias) bias_.write(problem_.rows, row_, rows_);
    if (col_bias) bias_.write(problem_.cols, col_, cols_);
  }

 private:
  // Tokens of the largest chunk.
  int64_t chunk_size() const {
    if (problem_.tokens > kChunkTokens) return kChunkTokens;
    return min(problem_.samples, kChunkTokens / problem_.tokens) * problem_.tokens;
  }

  // The panels that begin at row r and at column c of the block.
  Operand row_panel(const Chunk& chunk, int64_t r) const {
    return packed(packed_rows_ + r * chunk.size(), chunk, min(kTileRows, rows_ - r));
  }

  Operand col_panel(const Chunk& chunk, int64_t c) const {
    if (c < in_place_cols_) return part_of(problem_.cols, chunk, col_ + c, kTileCols);
    return packed(packed_cols_ + (c - in_place_cols_) * chunk.size(), chunk,
                  min(kTileCols, padded_cols_ - c));
  }

  static void fill(float* p, int64_t size) {
    for (int64_t i = 0; i < size; ++i) p[i] = 0.0f;
  }

  // Calls visit(row, rows, col, cols padded, offset) for every tile; tiles lie one after another.
  // The panel of columns, the wider one, stays in the nearest cache while the rows pass by.
  template <typename Visit>
  void for_each_tile(Visit visit) const {
    for (int64_t c = 0; c < padded_cols_; c += kTileCols) {
      const int64_t cols = min(kTileCols, padded_cols_ - c);
      for (int64_t r = 0; r < rows_; r += kTileRows)
        visit(r, min(kTileRows, rows_ - r), c, cols, c * rows_ + r * cols);
    }
  }

  void compute_chunk(const Chunk& chunk) const {
    if (mask_) fill(scores_, chunk.samples * kWidth);
    for_each_tile([&](int64_t r, int64_t rows, int64_t c, int64_t cols, int64_t offset) {
      float* partial = partial_ ? partial_ + offset : nullptr;
      const Tile tile{
          .samples = chunk.samples,
          .tokens = chunk.tokens,
          .rows = packed_rows_ + r * chunk.size(),
          .cols = col_panel(chunk, c),
          .ahead = c < in_place_cols_ && r == 0,
          .partial_in = chunk.first ? nullptr : partial,
          .partial_out = chunk.last ? nullptr : partial,
          .fisher = fisher_ + offset,
          .mask = mask_ ? mask_ + offset : nullptr,
          .scores = scores_,
      };
      with_type(tile.cols.dtype,
                [&]<typename T>(T) { tile_function<T>(rows, cols / kWidth)(tile); });
    });
    if (!mask_ || !chunk.last) return;
    for (int64_t n = 0; n < chunk.samples; ++n) {
      double score = 0.0;
      for (int j = 0; j < kWidth; ++j) score += scores_[n * kWidth + j];
      problem_.scores[index_ * problem_.samples + chunk.sample + n] = score;
    }
  }

  // Which squares count in the scores: not those outside the mask, nor the padding.
  void pack_mask() const {
    for_each_tile([&](int64_t r, int64_t rows, int64_t c, int64_t cols, int64_t offset) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          const bool inside = c + j < cols_;
          const bool counts = inside && (!problem_.mask ||
                                         problem_.mask[(row_ + r + i) * problem_.mask_row_stride +
                                                       (col_ + c + j) * problem_.mask_col_stride]);
          mask_[offset + i * cols + j] = __builtin_bit_cast(float, counts ? -1 : 0);
        }
      }
    });
  }

  void add_to_output() const {
    const int64_t row_stride = problem_.row_stride, col_stride = problem_.col_stride;
    for_each_tile([&](int64_t r, int64_t rows, int64_t c, int64_t padded, int64_t offset) {
      const int64_t cols = min(padded, cols_ - c);
      const float* in = fisher_ + offset;
      float* out = problem_.fisher + (row_ + r) * row_stride + (col_ + c) * col_stride;
      if (row_stride < col_stride) {
        for (int64_t j = 0; j < cols; ++j)
          for (int64_t i = 0; i < rows; ++i)
            out[i * row_stride + j * col_stride] += in[i * padded + j];
      } else {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < cols; ++j)
            out[i * row_stride + j * col_stride] += in[i * padded + j];
      }
    });
  }

  const Problem& problem_;
  int64_t index_, row_, col_, rows_, cols_, padded_cols_, in_place_cols_;
  int64_t used_ = 0;
  float *fisher_, *packed_rows_, *packed_cols_;
  float *partial_ = nullptr, *mask_ = nullptr, *scores_ = nullptr;
  BiasSums bias_;
};

}  // namespace

int64_t scratch_size(const Problem& problem) { return Block(problem, 0, nullptr).scratch_size(); }

void compute_block(const Problem& problem, int64_t block, float* scratch) {
  Block(problem, block, scratch).compute();
}

}  // namespace fishkern::fisher::FISHKERN_ISA
