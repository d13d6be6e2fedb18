// fisher += sum_n (sum_t grad_out[n,t] x[n,t]^T)^2, squared after the sum over t.
//
// This file knows tensors: it brings them into the form of simd/fisher.h.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/fisher_blocks.h"
#include "cpu/tensors.h"

namespace fishkern::fisher {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "linear_fisher_";

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
  compute({problem}, score_data, sample_scores ? sample_scores->stride(0) : 0);
}

}  // namespace
}  // namespace fishkern::fisher

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("linear_fisher_", TORCH_BOX(&fishkern::fisher::linear_fisher_));
}
