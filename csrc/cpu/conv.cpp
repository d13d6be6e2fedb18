// fisher += sum_n (sum_tp grad_out[n,t,:,p] patch(x[n,t], p)^T)^2, squared after the sum over p.
//
// A convolution's Fisher accumulation is that of a linear layer, with the output's positions as
// tokens and the kernel's entries as features. The patches are packed from the input where it lies
// (simd/fisher_window.h). Groups are problems side by side; those of a single channel, which would
// be products of almost nothing, have sums of their own (depthwise.h).

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/depthwise.h"
#include "cpu/fisher_blocks.h"
#include "cpu/tensors.h"

namespace fishkern::fisher {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "conv_fisher_";

// Groups of one channel and at most so many outputs are summed, not multiplied as matrices.
constexpr int64_t kDepthwiseOutputs = 2;

Tensor reshaped(const Tensor& tensor, const std::vector<int64_t>& shape) {
  return torch::stable::reshape(tensor, {shape.data(), shape.size()});
}

// Numbers of the spatial dimensions, which are the last ones of three.
void set_last(int64_t (&out)[3], const std::vector<int64_t>& values) {
  for (size_t d = 0; d < values.size(); ++d) out[3 - values.size() + d] = values[d];
}

void conv_fisher_(Tensor fisher, Tensor x, Tensor grad_out, std::optional<Tensor> bias_fisher,
                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups,
                  std::optional<Tensor> sample_scores, std::optional<Tensor> mask) {
  const int64_t dims = fisher.dim() - 2, lead = x.dim() - dims - 1;
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && lead >= 1 && grad_out.dim() == x.dim(),
                  "x must be [N, *, C, *S] and grad_out [N, *, O, *P] with one to three spatial "
                  "dimensions");
  const size_t each = dims;
  STD_TORCH_CHECK(stride.size() == each && padding.size() == each && dilation.size() == each,
                  "stride, padding and dilation must have a number for each spatial dimension");
  const int64_t num_samples = x.size(0), num_outputs = fisher.size(0);
  const std::vector<int64_t> weight_shape(fisher.sizes().begin(), fisher.sizes().end());
  Window window;
  std::vector<int64_t> x_shape(x.sizes().begin(), x.sizes().begin() + lead);
  std::vector<int64_t> grad_shape = x_shape;
  x_shape.push_back(fisher.size(1) * groups);
  grad_shape.push_back(num_outputs);
  int64_t num_calls = 1, num_positions = 1, num_features = fisher.size(1);
  for (int64_t d = 1; d < lead; ++d) num_calls *= x.size(d);
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1,
                    "stride and dilation must be at least 1, padding at least 0");
    const int64_t input = x.size(lead + 1 + d), reach = dilation[d] * (fisher.size(2 + d) - 1);
    const int64_t output = (input + 2 * padding[d] - reach - 1) / stride[d] + 1;
    x_shape.push_back(input);
    grad_shape.push_back(output);
    num_positions *= output;
    num_features *= fisher.size(2 + d);
  }
  STD_TORCH_CHECK(groups >= 1 && num_outputs % groups == 0, "groups must divide the outputs");
  check_shape(kOp, "x", x, x_shape);
  check_shape(kOp, "grad_out", grad_out, grad_shape);
  accumulator(kOp, "fisher", fisher, weight_shape);
  float* const bias_data =
      bias_fisher ? accumulator(kOp, "bias_fisher", *bias_fisher, {num_outputs}) : nullptr;
  float* const score_data =
      sample_scores ? accumulator(kOp, "sample_scores", *sample_scores, {num_samples}) : nullptr;
  if (mask) mask_data(kOp, "mask", *mask, weight_shape);
  if (num_samples * num_calls * num_positions * num_outputs == 0) return;

  // Weights as [O, features]; a copy only where the kernel's dimensions cannot be joined.
  Tensor flat = reshaped(fisher, {num_outputs, num_features});
  std::optional<Tensor> flat_mask;
  if (mask) flat_mask = reshaped(*mask, {num_outputs, num_features});
  const Tensor grad = as_samples_tokens(torch::stable::transpose(
      reshaped(grad_out, {num_samples, num_calls, num_outputs, num_positions}), 2, 3));
  std::vector<int64_t> shape{num_samples, num_calls, x.size(lead)};
  shape.insert(shape.end(), x_shape.begin() + lead + 1, x_shape.end());
  const Tensor input = readable(reshaped(x, shape));

  set_last(window.inputs, {x_shape.begin() + lead + 1, x_shape.end()});
  set_last(window.outputs, {grad_shape.begin() + lead + 1, grad_shape.end()});
  set_last(window.kernel, {weight_shape.begin() + 2, weight_shape.end()});
  set_last(window.stride, stride);
  set_last(window.padding, padding);
  set_last(window.dilation, dilation);
  window.call_step = input.stride(1);
  window.channel_step = input.stride(2);
  set_last(window.steps, {input.strides().begin() + 3, input.strides().end()});

  const int64_t outputs = num_outputs / groups;
  const auto copy_back = [&] {
    if (flat.const_data_ptr() != fisher.const_data_ptr())
      torch::stable::copy_(fisher, reshaped(flat, weight_shape));
  };
  const int64_t score_stride = sample_scores ? sample_scores->stride(0) : 0;
  if (fisher.size(1) == 1 && outputs <= kDepthwiseOutputs) {
    depthwise::Problem problem{.grad = operand(grad),
                               .x = input.const_data_ptr(),
                               .x_dtype = operand_dtype(input),
                               .x_sample_stride = input.stride(0),
                               .window = window,
                               .samples = num_samples,
                               .calls = num_calls,
                               .multiplier = outputs,
                               .fisher = static_cast<float*>(flat.mutable_data_ptr()),
                               .row_stride = flat.stride(0),
                               .col_stride = flat.stride(1)};
    if (sample_scores && mask) {
      problem.mask = static_cast<const bool*>(flat_mask->const_data_ptr());
      problem.mask_row_stride = flat_mask->stride(0);
      problem.mask_col_stride = flat_mask->stride(1);
    }
    problem.bias = bias_data;
    problem.bias_stride = bias_fisher ? bias_fisher->stride(0) : 0;
    depthwise::compute(problem, score_data, score_stride);
    copy_back();
    return;
  }
  Side rows{operand(grad)};
  rows.size = outputs;
  rows.bias = bias_data;
  rows.bias_stride = bias_fisher ? bias_fisher->stride(0) : 0;
  Side cols{{.data = input.const_data_ptr(),
             .dtype = operand_dtype(input),
             .size = num_features,
             .sample_stride = input.stride(0),
             .token_stride = 0,
             .stride = 0}};
  cols.window = &window;
  Problem problem{.rows = rows,
                  .cols = cols,
                  .samples = num_samples,
                  .tokens = num_calls * num_positions,
                  .fisher = static_cast<float*>(flat.mutable_data_ptr()),
                  .row_stride = flat.stride(0),
                  .col_stride = flat.stride(1)};
  if (sample_scores && mask) {
    problem.mask = static_cast<const bool*>(flat_mask->const_data_ptr());
    problem.mask_row_stride = flat_mask->stride(0);
    problem.mask_col_stride = flat_mask->stride(1);
  }
  std::vector<Problem> problems;
  for (int64_t g = 0; g < groups; ++g) {
    problems.push_back(problem);
    advance(problem.rows, outputs * grad.stride(2));
    advance(problem.cols, fisher.size(1) * window.channel_step);
    problem.fisher += outputs * problem.row_stride;
    if (bias_data) problem.rows.bias += outputs * rows.bias_stride;
    if (problem.mask) problem.mask += outputs * problem.mask_row_stride;
  }
  compute(std::move(problems), score_data, score_stride);
  copy_back();
}

}  // namespace
}  // namespace fishkern::fisher

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("conv_fisher_", TORCH_BOX(&fishkern::fisher::conv_fisher_));
}
