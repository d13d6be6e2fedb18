// How the tensors of the Fisher ops become what csrc/cpu/simd computes with.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/simd/operand.h"

namespace fishkern {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<float, AlignedDelete>;

inline Scratch new_scratch(int64_t size) {
  return Scratch(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t{64})));
}

// The tensor in float32 or a 16-bit type; a copy only where the dtype is another one.
inline torch::stable::Tensor readable(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  const bool as_it_is =
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  return as_it_is ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

// [N, *, features] as [N, T, features], readable; a copy only where the token dimensions cannot be
// joined or the dtype is another one.
inline torch::stable::Tensor as_samples_tokens(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  int64_t tokens = 1;
  for (int64_t d = 1; d < last; ++d) tokens *= tensor.size(d);
  const std::array<int64_t, 3> shape{tensor.size(0), tokens, tensor.size(last)};
  return readable(torch::stable::reshape(tensor, {shape.data(), shape.size()}));
}

inline Dtype operand_dtype(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float      ? Dtype::float32
         : dtype == ScalarType::BFloat16 ? Dtype::bfloat16
                                         : Dtype::float16;
}

inline Operand operand(const torch::stable::Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .dtype = operand_dtype(tensor),
          .size = tensor.size(2),
          .sample_stride = tensor.stride(0),
          .token_stride = tensor.stride(1),
          .stride = tensor.stride(2)};
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_shape(const char* op, const char* name, const torch::stable::Tensor& tensor,
                        const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name,
                  " has shape ", shape_text(sizes), ", expected ", shape_text(shape),
                  ": see fishkern.functional.", op);
}

inline float* accumulator(const char* op, const char* name, const torch::stable::Tensor& tensor,
                          const std::vector<int64_t>& shape) {
  check_shape(op, name, tensor, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, "the native ", op,
                  " takes ", name, " in float32, got ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  ": use float32, or fishkern.use_backend(\"reference\") for float64");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline const bool* mask_data(const char* op, const char* name, const torch::stable::Tensor& tensor,
                             const std::vector<int64_t>& shape) {
  check_shape(op, name, tensor, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Bool, name,
                  " must be a bool tensor");
  return static_cast<const bool*>(tensor.const_data_ptr());
}

}  // namespace fishkern
