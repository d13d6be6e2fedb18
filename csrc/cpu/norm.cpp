// weight_fisher += sum_n (sum_t grad_out x_hat)^2 and bias_fisher += sum_n (sum_t grad_out)^2.
//
// Samples are shared out in groups whose number depends on shapes only, and the groups' sums are
// added in their order, so the result does not depend on the number of threads, bit for bit.

#include "cpu/simd/norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace fishkern::norm {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "norm_fisher_";

// At most so many groups of samples, each with sums of its own.
constexpr int64_t kGroups = 32;

// Fewer numbers than this are not worth another thread.
constexpr int64_t kGrain = 1 << 16;

// fisher += the groups' sums, [groups][stride], in their order.
void add_groups(const Tensor& fisher, float* data, const float* sums, int64_t groups,
                int64_t stride) {
  for (int64_t c = 0; c < fisher.size(0); ++c) {
    float total = 0.0f;
    for (int64_t g = 0; g < groups; ++g) total += sums[g * stride + c];
    data[c * fisher.stride(0)] += total;
  }
}

void norm_fisher_(std::optional<Tensor> weight_fisher, std::optional<Tensor> bias_fisher,
                  std::optional<Tensor> x_hat, Tensor grad_out, std::optional<Tensor> sample_scores,
                  std::optional<Tensor> weight_mask, std::optional<Tensor> bias_mask) {
  STD_TORCH_CHECK(grad_out.dim() >= 2, "grad_out must be [N, *, C]");
  STD_TORCH_CHECK(!weight_fisher || x_hat, "weight_fisher needs x_hat");
  const int64_t num_samples = grad_out.size(0), size = grad_out.size(grad_out.dim() - 1);
  if (weight_fisher)
    check_shape(kOp, "x_hat", *x_hat, {grad_out.sizes().begin(), grad_out.sizes().end()});
  float* const weight_data =
      weight_fisher ? accumulator(kOp, "weight_fisher", *weight_fisher, {size}) : nullptr;
  float* const bias_data =
      bias_fisher ? accumulator(kOp, "bias_fisher", *bias_fisher, {size}) : nullptr;
  float* const score_data =
      sample_scores ? accumulator(kOp, "sample_scores", *sample_scores, {num_samples}) : nullptr;
  const bool* const weight_counts =
      weight_mask ? mask_data(kOp, "weight_mask", *weight_mask, {size}) : nullptr;
  const bool* const bias_counts =
      bias_mask ? mask_data(kOp, "bias_mask", *bias_mask, {size}) : nullptr;

  const Tensor grad = as_samples_tokens(grad_out);
  std::optional<Tensor> factor;
  if (weight_fisher) factor = as_samples_tokens(*x_hat);
  if (grad.numel() == 0 || (!weight_fisher && !bias_fisher)) return;

  const Problem problem{
      .grad = operand(grad),
      .x_hat = factor ? operand(*factor) : Operand{},
      .samples = num_samples,
      .tokens = grad.size(1),
      .weight = {weight_data != nullptr, weight_counts, weight_mask ? weight_mask->stride(0) : 0},
      .bias = {bias_data != nullptr, bias_counts, bias_mask ? bias_mask->stride(0) : 0},
      .scores = score_data,
      .score_stride = sample_scores ? sample_scores->stride(0) : 0};
  const auto add_samples = FISHKERN_FOR_THIS_CPU(add_samples);
  const int64_t scratch_size = (*FISHKERN_FOR_THIS_CPU(scratch_size))(problem);
  const int64_t groups = std::min(num_samples, kGroups);
  std::vector<float> sums(groups * 2 * size);  // of the weight, of the bias
  const int64_t work = grad.numel() / groups;
  const int64_t grain = kGrain / std::max<int64_t>(work, 1) + 1;
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_size);
    for (int64_t g = begin; g < end; ++g) {
      float* const weight = sums.data() + g * 2 * size;
      add_samples(problem, num_samples * g / groups, num_samples * (g + 1) / groups, weight,
                  weight + size, scratch.data());
    }
  });
  if (weight_data) add_groups(*weight_fisher, weight_data, sums.data(), groups, 2 * size);
  if (bias_data) add_groups(*bias_fisher, bias_data, sums.data() + size, groups, 2 * size);
}

}  // namespace
}  // namespace fishkern::norm

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("norm_fisher_", TORCH_BOX(&fishkern::norm::norm_fisher_));
}
