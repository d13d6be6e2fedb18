// fisher[v] += sum_n (sum of grad_out[n,t] over the t with ids[n,t] = v)^2.
//
// Each sample's tokens are sorted by id, so that one row at a time is summed, squared and added:
// nothing of the embedding's size is made. Threads share out blocks of columns and all go through
// the samples in the same order, so the result does not depend on their number, bit for bit.

#include "cpu/simd/embedding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace fishkern::embedding {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "embedding_fisher_";

// Fewer numbers than this are not worth another thread.
constexpr int64_t kGrain = 1 << 16;

// The tokens of all samples, sorted by id within each, and where each id's begin and end.
struct Sorted {
  std::vector<int64_t> tokens;
  std::vector<Segment> segments;
};

Sorted sort_by_id(const int64_t* ids, int64_t num_samples, int64_t num_tokens,
                  std::optional<int64_t> padding_idx) {
  Sorted sorted;
  sorted.tokens.reserve(num_samples * num_tokens);
  sorted.segments.reserve(num_samples * num_tokens);
  std::vector<std::pair<int64_t, int64_t>> sample(num_tokens);  // (id, token)
  for (int64_t n = 0; n < num_samples; ++n) {
    for (int64_t t = 0; t < num_tokens; ++t) sample[t] = {ids[n * num_tokens + t], t};
    std::sort(sample.begin(), sample.end());
    int64_t before = -1;
    for (const auto& [id, t] : sample) {
      if (padding_idx && id == *padding_idx) continue;
      const int64_t position = sorted.tokens.size();
      if (id != before) sorted.segments.push_back({id, n, position, position});
      sorted.tokens.push_back(t);
      sorted.segments.back().end = position + 1;
      before = id;
    }
  }
  return sorted;
}

void embedding_fisher_(Tensor fisher, Tensor ids, Tensor grad_out,
                       std::optional<int64_t> padding_idx, std::optional<Tensor> sample_scores,
                       std::optional<Tensor> mask) {
  STD_TORCH_CHECK(ids.dim() >= 1 && grad_out.dim() == ids.dim() + 1 && fisher.dim() == 2,
                  "ids must be [N, *], grad_out [N, *, H] and fisher [V, H]");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long,
                  "ids must be int32 or int64");
  const int64_t num_samples = ids.size(0), size = grad_out.size(grad_out.dim() - 1);
  std::vector<int64_t> grad_shape(ids.sizes().begin(), ids.sizes().end());
  grad_shape.push_back(size);
  check_shape(kOp, "grad_out", grad_out, grad_shape);
  const int64_t num_rows = fisher.size(0);
  const std::vector<int64_t> shape{num_rows, size};
  float* const fisher_data = accumulator(kOp, "fisher", fisher, shape);
  float* const score_data =
      sample_scores ? accumulator(kOp, "sample_scores", *sample_scores, {num_samples}) : nullptr;
  const bool* const mask_values = mask ? mask_data(kOp, "mask", *mask, shape) : nullptr;

  const Tensor grad = as_samples_tokens(grad_out);
  const Tensor contiguous = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const auto* const id_data = static_cast<const int64_t*>(contiguous.const_data_ptr());
  const auto [lowest, highest] = std::minmax_element(id_data, id_data + contiguous.numel());
  if (contiguous.numel() == 0) return;
  STD_TORCH_CHECK(0 <= *lowest && *highest < num_rows, "ids run from ", *lowest, " to ", *highest,
                  ", but fisher has ", num_rows, " rows");
  if (size == 0) return;

  const Sorted sorted = sort_by_id(id_data, num_samples, grad.size(1), padding_idx);
  Problem problem{.grad = operand(grad),
                  .samples = num_samples,
                  .tokens = sorted.tokens.data(),
                  .segments = sorted.segments.data(),
                  .num_segments = static_cast<int64_t>(sorted.segments.size()),
                  .fisher = fisher_data,
                  .row_stride = fisher.stride(0),
                  .col_stride = fisher.stride(1)};
  const int64_t num_blocks = (size + kBlock - 1) / kBlock;
  std::vector<double> scores;
  if (sample_scores) {
    scores.resize(num_blocks * num_samples);
    problem.scores = scores.data();
  }
  if (sample_scores && mask) {
    problem.mask = mask_values;
    problem.mask_row_stride = mask->stride(0);
    problem.mask_col_stride = mask->stride(1);
  }
  const auto compute_block = FISHKERN_FOR_THIS_CPU(compute_block);
  const int64_t work = static_cast<int64_t>(sorted.tokens.size()) * std::min(size, kBlock);
  const int64_t grain = kGrain / std::max<int64_t>(work, 1) + 1;
  torch::stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) compute_block(problem, block);
  });
  for (int64_t n = 0; score_data && n < num_samples; ++n) {
    double score = 0.0;
    for (int64_t block = 0; block < num_blocks; ++block) score += scores[block * num_samples + n];
    score_data[n * sample_scores->stride(0)] += static_cast<float>(score);
  }
}

}  // namespace
}  // namespace fishkern::embedding

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("embedding_fisher_", TORCH_BOX(&fishkern::embedding::embedding_fisher_));
}
