// fisher += sum_n (sum_t grad_out[n,t] x[n,t]^T)^2, squared after the sum over t.
//
// This file knows tensors: it brings them into the form of simd/fisher.h, spreads the blocks of the
// result over threads and adds up the scores. Threads never share a block and a block's arithmetic
// depends on shapes only, so the result does not depend on the number of threads, bit for bit.

#include "cpu/simd/fisher.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace fishkern::fisher {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "linear_fisher_";

// Blocks of the result: large enough that packing is cheap beside the products, small enough for
// the second-level cache, and, if the result is small, for enough of them to share among threads.
constexpr int64_t kBlockRows = 128, kSmallBlockRows = 64;
constexpr int64_t kBlockCols = 384, kSmallBlockCols = 192;
constexpr int64_t kEnoughBlocks = 16;

// Fewer floating-point operations than this are not worth another thread.
constexpr int64_t kGrain = 1 << 20;

// The shorter operand is read one number at a time, the longer one in vectors.
void make_columns_long(Problem& problem) {
  if (problem.cols.size >= std::min(problem.rows.size, kSmallBlockCols)) return;
  std::swap(problem.rows, problem.cols);
  std::swap(problem.row_stride, problem.col_stride);
  std::swap(problem.mask_row_stride, problem.mask_col_stride);
}

// By shapes alone: the order in which scores are added up follows from it.
void choose_blocks(Problem& problem) {
  problem.block_rows = kBlockRows;
  problem.block_cols = kBlockCols;
  if (problem.num_blocks() < kEnoughBlocks) problem.block_cols = kSmallBlockCols;
  if (problem.num_blocks() < kEnoughBlocks) problem.block_rows = kSmallBlockRows;
}

void compute(const Problem& problem) {
  const auto compute_block = FISHKERN_FOR_THIS_CPU(compute_block);
  const int64_t scratch_size = (*FISHKERN_FOR_THIS_CPU(scratch_size))(problem);
  const int64_t work = 2 * problem.samples * problem.tokens *
                       std::min(problem.block_rows, problem.rows.size) *
                       std::min(problem.block_cols, problem.cols.size);
  const int64_t grain = kGrain / std::max<int64_t>(work, 1) + 1;
  torch::stable::parallel_for(0, problem.num_blocks(), grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = new_scratch(scratch_size);
    for (int64_t block = begin; block < end; ++block) compute_block(problem, block, scratch.get());
  });
}

// sample_scores[n] += the blocks' parts, in the blocks' order.
void add_scores(const Problem& problem, const std::vector<double>& parts, float* sample_scores,
                int64_t stride) {
  for (int64_t n = 0; n < problem.samples; ++n) {
    double score = 0.0;
    for (int64_t block = 0; block < problem.num_blocks(); ++block)
      score += parts[block * problem.samples + n];
    sample_scores[n * stride] += static_cast<float>(score);
  }
}

void linear_fisher_(Tensor fisher, Tensor x, Tensor grad_out, std::optional<Tensor> bias_fisher,
                    std::optional<Tensor> sample_scores, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(x.dim() >= 2 && grad_out.dim() == x.dim(),
                  "x must be [N, *, I] and grad_out [N, *, O] with the same leading dimensions");
  const int64_t num_samples = x.size(0), last = x.dim() - 1;
  const int64_t num_outputs = grad_out.size(last), num_inputs = x.size(last);
  std::vector<int64_t> grad_shape(x.sizes().begin(), x.sizes().end());
  grad_shape.back() = num_outputs;
  check_shape(kOp, "grad_out", grad_out, grad_shape);
  const std::vector<int64_t> shape{num_outputs, num_inputs};
  float* const fisher_data = accumulator(kOp, "fisher", fisher, shape);
  float* const bias_data =
      bias_fisher ? accumulator(kOp, "bias_fisher", *bias_fisher, {num_outputs}) : nullptr;
  float* const score_data =
      sample_scores ? accumulator(kOp, "sample_scores", *sample_scores, {num_samples}) : nullptr;
  const bool* const mask_values = mask ? mask_data(kOp, "mask", *mask, shape) : nullptr;

  const Tensor x3 = as_samples_tokens(x), grad3 = as_samples_tokens(grad_out);
  const int64_t num_tokens = x3.size(1);
  if (num_samples == 0 || num_tokens == 0 || num_outputs == 0) return;

  Problem problem{.rows = {operand(grad3)},
                  .cols = {operand(x3)},
                  .samples = num_samples,
                  .tokens = num_tokens,
                  .fisher = fisher_data,
                  .row_stride = fisher.stride(0),
                  .col_stride = fisher.stride(1)};
  problem.rows.bias = bias_data;
  if (bias_data) problem.rows.bias_stride = bias_fisher->stride(0);
  if (sample_scores && mask) {
    problem.mask = mask_values;
    problem.mask_row_stride = mask->stride(0);
    problem.mask_col_stride = mask->stride(1);
  }
  make_columns_long(problem);
  choose_blocks(problem);

  std::vector<double> scores;
  if (sample_scores) {
    scores.resize(problem.num_blocks() * num_samples);
    problem.scores = scores.data();
  } else if (num_tokens == 1) {
    problem.squared = true;
    std::swap(problem.samples, problem.tokens);
    std::swap(problem.rows.sample_stride, problem.rows.token_stride);
    std::swap(problem.cols.sample_stride, problem.cols.token_stride);
  }
  compute(problem);
  if (sample_scores) add_scores(problem, scores, score_data, sample_scores->stride(0));
}

}  // namespace
}  // namespace fishkern::fisher

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("linear_fisher_", TORCH_BOX(&fishkern::fisher::linear_fisher_));
}
