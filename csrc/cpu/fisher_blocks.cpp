#include "cpu/fisher_blocks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "cpu/tensors.h"

namespace fishkern::fisher {
namespace {

// Blocks of the result: as large as a second-level cache takes, since operands are packed again for
// each block; smaller ones where there would be too few to share among threads. Columns that are
// read in place are best read to the end of their line in memory.
constexpr int64_t kBlockRows[] = {384, 128, 64};
constexpr int64_t kMostCols = 384, kMostColsInPlace = 1536, kFewestCols = 192;

// Fewer floating-point operations than this are not worth another thread.
constexpr int64_t kGrain = 1 << 20;

// The shorter operand is read one number at a time, the longer one in vectors.
void make_columns_long(Problem& problem) {
  if (problem.cols.size >= std::min(problem.rows.size, kFewestCols)) return;
  std::swap(problem.rows, problem.cols);
  std::swap(problem.row_stride, problem.col_stride);
  std::swap(problem.mask_row_stride, problem.mask_col_stride);
}

// Packing pays where many rows share a panel of columns. Where they are few, the operands are as
// good as read once, and packing would be most of the time.
bool reads_in_place(const Problem& problem) {
  if (problem.cols.stride != 1 || problem.cols.window) return false;
  if (problem.cols.dtype == Dtype::float32) return problem.rows.size <= 64;
  // Converted again for each tile: cheap enough with instructions for it.
  return problem.rows.size <= 16 && capability() != Capability::baseline;
}

// Of the block sizes, from large to small, the first one that makes enough blocks, or the last one.
void choose_blocks(Problem& problem, int64_t num_problems, int64_t enough) {
  for (const int64_t rows : kBlockRows) {
    const int64_t most = problem.in_place ? kMostColsInPlace : kMostCols;
    for (int64_t cols = most; cols >= kFewestCols; cols /= 2) {
      problem.block_rows = rows, problem.block_cols = cols;
      if (num_problems * problem.num_blocks() >= enough) return;
    }
  }
}

// The number of blocks from which on threads share them evenly. With scores it must not depend on
// the number of threads: the order in which they are added up follows from it.
int64_t enough_blocks(const Problem& problem, bool scores) {
  constexpr int64_t kEach = 4, kWithScores = 16;
  const int64_t threads = torch::stable::get_num_threads();
  if (scores) return kWithScores;
  return threads == 1 || problem.in_place ? threads : kEach * threads;
}

}  // namespace

void compute(std::vector<Problem> problems, float* sample_scores, int64_t stride) {
  if (problems.empty()) return;
  for (Problem& problem : problems) {
    make_columns_long(problem);
    problem.in_place = reads_in_place(problem);
    choose_blocks(problem, problems.size(), enough_blocks(problem, sample_scores));
  }
  const Problem& first = problems.front();
  const int64_t num_blocks = first.num_blocks(), num_samples = first.samples;
  const int64_t num_parts = static_cast<int64_t>(problems.size()) * num_blocks;
  std::vector<double> parts;
  if (sample_scores) {
    parts.resize(num_parts * num_samples);
    for (size_t p = 0; p < problems.size(); ++p)
      problems[p].scores = parts.data() + p * num_blocks * num_samples;
  }

  const auto compute_block = FISHKERN_FOR_THIS_CPU(compute_block);
  const int64_t scratch_size = (*FISHKERN_FOR_THIS_CPU(scratch_size))(first);
  const int64_t work = 2 * first.samples * first.tokens *
                       std::min(first.block_rows, first.rows.size) *
                       std::min(first.block_cols, first.cols.size);
  const int64_t grain = kGrain / std::max<int64_t>(work, 1) + 1;
  torch::stable::parallel_for(0, num_parts, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = new_scratch(scratch_size);
    for (int64_t part = begin; part < end; ++part)
      compute_block(problems[part / num_blocks], part % num_blocks, scratch.get());
  });

  if (!sample_scores) return;
  for (int64_t n = 0; n < num_samples; ++n) {  // the blocks' parts, in the blocks' order
    double score = 0.0;
    for (int64_t part = 0; part < num_parts; ++part) score += parts[part * num_samples + n];
    sample_scores[n * stride] += static_cast<float>(score);
  }
}

}  // namespace fishkern::fisher
