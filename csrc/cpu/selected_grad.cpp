// selected_grad += (sum_p grad_out[p]^T x[p]).flatten()[indices], p all tokens of all samples.
//
// Each entry is a dot product of its own, so that the work is that of the selected entries and the
// gradient is nowhere. Threads share out rows. An entry's sum is taken in the order of the tokens,
// in chunks that depend on shapes only, so the result does not depend on the number of threads,
// bit for bit.

#include "cpu/simd/selected_grad.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace fishkern::selected_grad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "linear_selected_grad_";

// Packed columns should take no more than this many floats of the second-level cache.
constexpr int64_t kColumnFloats = 1 << 17;
constexpr int64_t kShortestChunk = 64, kLongestChunk = 256;

// Fewer multiply-adds than this are not worth another thread.
constexpr int64_t kGrain = 1 << 19;

// Which features of an operand are read, in the order of the matrix that indices point into.
std::vector<int64_t> features_of(const char* name, const std::optional<Tensor>& list,
                                 int64_t size) {
  std::vector<int64_t> features;
  if (!list) {
    features.resize(size);
    for (int64_t i = 0; i < size; ++i) features[i] = i;
    return features;
  }
  const Tensor contiguous = torch::stable::contiguous(torch::stable::to(*list, ScalarType::Long));
  const auto* const data = static_cast<const int64_t*>(contiguous.const_data_ptr());
  features.assign(data, data + contiguous.numel());
  for (const int64_t feature : features)
    STD_TORCH_CHECK(0 <= feature && feature < size, name, " holds ", feature,
                    ", but the operand has ", size, " features");
  return features;
}

// Where the selected entries lie: the rows and columns that have any, and the entries row by row.
struct Pattern {
  std::vector<int64_t> rows, row_begin, cols;
  std::vector<int32_t> entry_cols;
};

template <typename Index>
Pattern pattern_of(const Index* indices, int64_t count, int64_t num_rows, int64_t num_cols) {
  Pattern pattern;
  pattern.entry_cols.resize(count);
  std::vector<int32_t> packed_at(num_cols, -1);
  int64_t row = -1, row_end = 0, before = -1;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t index = indices[e];
    STD_TORCH_CHECK(before < index && index < num_rows * num_cols, "indices must ascend from 0 to ",
                    num_rows * num_cols - 1, ", but ", before, " is followed by ", index);
    before = index;
    if (index >= row_end) {
      row = index / num_cols;
      row_end = (row + 1) * num_cols;
      pattern.rows.push_back(row);
      pattern.row_begin.push_back(e);
    }
    const int64_t col = index - (row_end - num_cols);
    packed_at[col] = 0;
    pattern.entry_cols[e] = static_cast<int32_t>(col);
  }
  pattern.row_begin.push_back(count);
  for (int64_t col = 0; col < num_cols; ++col) {
    if (packed_at[col] < 0) continue;
    packed_at[col] = static_cast<int32_t>(pattern.cols.size());
    pattern.cols.push_back(col);
  }
  for (int32_t& col : pattern.entry_cols) col = packed_at[col];
  return pattern;
}

Pattern pattern_of(const Tensor& indices, int64_t num_rows, int64_t num_cols) {
  const Tensor contiguous = torch::stable::contiguous(indices);
  const void* const data = contiguous.const_data_ptr();
  const int64_t count = contiguous.numel();
  return indices.scalar_type() == ScalarType::Int
             ? pattern_of(static_cast<const int32_t*>(data), count, num_rows, num_cols)
             : pattern_of(static_cast<const int64_t*>(data), count, num_rows, num_cols);
}

// [*, features] as [N, T, features].
Tensor as_tokens(const Tensor& tensor) {
  if (tensor.dim() > 1) return as_samples_tokens(tensor);
  const std::array<int64_t, 3> shape{1, 1, tensor.size(0)};
  return readable(torch::stable::reshape(tensor, {shape.data(), shape.size()}));
}

Side side(const Tensor& tensor, const std::vector<int64_t>& features) {
  return {operand(tensor), features.data(), static_cast<int64_t>(features.size())};
}

// Replaces positions in a list of features by the features.
void look_up(std::vector<int64_t>& positions, const std::vector<int64_t>& features) {
  for (int64_t& position : positions) position = features[position];
}

void linear_selected_grad_(Tensor selected_grad, Tensor x, Tensor grad_out, Tensor indices,
                           std::optional<Tensor> rows, std::optional<Tensor> columns) {
  STD_TORCH_CHECK(x.dim() >= 1 && grad_out.dim() == x.dim(),
                  "x must be [*, I] and grad_out [*, O] with the same leading dimensions");
  std::vector<int64_t> grad_shape(x.sizes().begin(), x.sizes().end());
  grad_shape.back() = grad_out.size(x.dim() - 1);
  check_shape(kOp, "grad_out", grad_out, grad_shape);
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long,
      "indices must be int32 or int64");
  float* const out = accumulator(kOp, "selected_grad", selected_grad, {indices.numel()});
  if (indices.numel() == 0) return;
  const auto row_features = features_of("rows", rows, grad_shape.back());
  const auto col_features = features_of("columns", columns, x.size(x.dim() - 1));
  Pattern pattern = pattern_of(indices, row_features.size(), col_features.size());
  look_up(pattern.rows, row_features);
  look_up(pattern.cols, col_features);

  const Tensor x3 = as_tokens(x), grad3 = as_tokens(grad_out);
  const int64_t num_rows = pattern.rows.size(), num_cols = pattern.cols.size();
  const int64_t chunk =
      std::clamp(kColumnFloats / num_cols / 64 * 64, kShortestChunk, kLongestChunk);
  const Problem problem{.rows = side(grad3, pattern.rows),
                        .cols = side(x3, pattern.cols),
                        .samples = x3.size(0),
                        .tokens = x3.size(1),
                        .row_begin = pattern.row_begin.data(),
                        .entry_cols = pattern.entry_cols.data(),
                        .out = out,
                        .out_stride = selected_grad.stride(0),
                        .chunk = chunk};
  const auto compute_rows = FISHKERN_FOR_THIS_CPU(compute_rows);
  const int64_t scratch_size = (*FISHKERN_FOR_THIS_CPU(scratch_size))(problem);
  const int64_t work = problem.samples * problem.tokens * indices.numel();
  const int64_t grain = kGrain * num_rows / std::max<int64_t>(work, 1) + 1;
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    compute_rows(problem, begin, end, new_scratch(scratch_size).get());
  });
}

}  // namespace
}  // namespace fishkern::selected_grad

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("linear_selected_grad_", TORCH_BOX(&fishkern::selected_grad::linear_selected_grad_));
}
