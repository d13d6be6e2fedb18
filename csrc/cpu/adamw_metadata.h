// What masked_adamw_ and its relatives ask of their tensors, and how they check it: everything
// before anything is changed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/adamw_entries.h"
#include "cpu/tensor_list.h"

namespace fishkern::adamw {

using torch::stable::Tensor;

inline Dtype floating_dtype(TensorRef tensor, const char* name, size_t i) {
  const int32_t dtype = tensor.dtype();
  if (dtype == aoti_torch_dtype_float32()) return Dtype::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::float16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float64(), name, "[", i,
                  "] is neither float32, bfloat16, float16 nor float64");
  return Dtype::float64;
}

// The state tensors: contiguous, of one dtype and length; the last two may be missing.
struct State {
  Dtype dtype;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  void* master;

  State(TensorRef m, TensorRef v, std::optional<TensorRef> v_max, std::optional<TensorRef> p,
        int64_t count, size_t i)
      : dtype(floating_dtype(m, "exp_avgs", i)),
        exp_avg(data(m, count, "exp_avgs", i)),
        exp_avg_sq(data(v, count, "exp_avg_sqs", i)),
        max_exp_avg_sq(data(v_max, count, "max_exp_avg_sqs", i)),
        master(data(p, count, "masters", i)) {}

  void assign(Run& run, int64_t begin) const {
    run.state_dtype = dtype;
    run.exp_avg = advance(exp_avg, begin * bytes_of(dtype));
    run.exp_avg_sq = advance(exp_avg_sq, begin * bytes_of(dtype));
    run.max_exp_avg_sq = advance(max_exp_avg_sq, begin * bytes_of(dtype));
    run.master = advance(master, begin * bytes_of(dtype));
  }

 private:
  void* data(std::optional<TensorRef> tensor, int64_t count, const char* name, size_t i) const {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() &&
                        floating_dtype(*tensor, name, i) == dtype &&
                        (dtype == Dtype::float32 || dtype == Dtype::float64),
                    name, "[", i,
                    "] must be contiguous and float32 as the rest of the state, with ", count,
                    " entries");
    return tensor->mutable_data_ptr();
  }
};

inline double scalar(TensorRef tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must hold one number");
  if (tensor.is_dtype(aoti_torch_dtype_float64)) {
    return *static_cast<const double*>(tensor.const_data_ptr());
  }
  STD_TORCH_CHECK(tensor.is_dtype(aoti_torch_dtype_float32), name,
                  " must be a float32 or float64 tensor");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

template <class Index>
void check_range(const void* indices, int64_t count, int64_t numel, size_t i) {
  const auto* index = static_cast<const Index*>(indices);
  for (const int64_t value : {int64_t{index[0]}, int64_t{index[count - 1]}}) {
    STD_TORCH_CHECK(0 <= value && value < numel, "indices[", i, "] holds ", value, ", but params[",
                    i, "] has ", numel, " entries");
  }
}

struct Options {
  double lr, beta1, beta2, eps, weight_decay, grad_divisor;

  Step at(double number) const {
    return {.decay = 1 - lr * weight_decay,
            .beta1 = beta1,
            .beta2 = beta2,
            .eps = eps,
            .size = lr / (1 - std::pow(beta1, number)),
            .rescale = 1 / std::sqrt(1 - std::pow(beta2, number)),
            .grad_divisor = grad_divisor,
            .number = static_cast<uint32_t>(number)};
  }
};

// The steps of all tensors; most often they are equal, and two powers are worth saving.
class Steps {
 public:
  // `raise`: count this step, too, once all is known to be in order.
  Steps(TensorRef steps, size_t n, const Options& options, bool raise = false)
      : options_(options), numel_(n), raise_(raise) {
    STD_TORCH_CHECK(steps.numel() == static_cast<int64_t>(n) && steps.is_contiguous() &&
                        steps.is_dtype(aoti_torch_dtype_float32),
                    "steps must be a contiguous float32 tensor with ", n, " entries");
    numbers_ = static_cast<float*>(steps.mutable_data_ptr());
  }

  const Step& operator[](size_t i) {
    const float number = numbers_[i] + (raise_ ? 1 : 0);
    if (number != number_) step_ = options_.at(number_ = number);
    return step_;
  }

  void write() {
    for (size_t i = 0; i < numel_; ++i) numbers_[i] += 1;
  }

 private:
  Options options_;
  size_t numel_;
  bool raise_;
  float* numbers_;
  float number_ = 0;
  Step step_ = options_.at(0);
};

// A parameter or a gradient: where it lies, and how.
struct Values {
  void* data;
  int64_t numel;
  Dtype dtype;
  Layout layout;

  Values(TensorRef tensor, const char* name, size_t i)
      : data(tensor.mutable_data_ptr()),
        numel(tensor.numel()),
        dtype(floating_dtype(tensor, name, i)),
        layout(tensor) {}
};

// One tensor's parameter and gradient; `indices` is null where every entry is selected.
inline Entries entries_of(const Values& param, const Values& grad, Positions indices, int64_t count,
                          const Step& step, size_t i) {
  STD_TORCH_CHECK(grad.numel == param.numel || grad.numel == count, "grads[", i, "] has ",
                  grad.numel, " entries; params[", i, "] has ", param.numel, ", selected are ",
                  count);
  if (indices.at == nullptr) {
    STD_TORCH_CHECK(count == param.numel, "indices[", i, "] is empty, but there is state for ",
                    count, " of ", param.numel, " entries");
  } else if (indices.bytes == 4) {
    check_range<int32_t>(indices.at, count, param.numel, i);
  } else {
    check_range<int64_t>(indices.at, count, param.numel, i);
  }
  const bool grad_selected = grad.numel == count;
  return {.run = {.count = count,
                  .param = param.data,
                  .grad = grad.data,
                  .param_dtype = param.dtype,
                  .grad_dtype = grad.dtype,
                  .state_dtype = Dtype::float32,
                  .param_at = indices,
                  .grad_at = grad_selected ? Positions{nullptr, 0} : indices,
                  .exp_avg = nullptr,
                  .exp_avg_sq = nullptr,
                  .max_exp_avg_sq = nullptr,
                  .master = nullptr,
                  .exp_avg_scale = nullptr,
                  .exp_avg_sq_scale = nullptr,
                  .first = 0},
          .step = step,
          .param_layout = param.layout,
          .grad_layout = grad.layout,
          .grad_selected = grad_selected};
}

inline int64_t index_bytes(TensorRef indices) {
  const bool is_int = indices.is_dtype(aoti_torch_dtype_int32);
  STD_TORCH_CHECK((is_int || indices.is_dtype(aoti_torch_dtype_int64)) && indices.is_contiguous(),
                  "indices must be contiguous, int32 or int64");
  return is_int ? 4 : 8;
}

// Where tensor i's `count` entries lie: `at` is null where all of it are selected.
inline Positions positions_of(TensorRef indices, int64_t count, size_t i) {
  const int64_t selected = indices.numel();
  STD_TORCH_CHECK(selected == 0 || selected == count, "exp_avgs[", i, "] has ", count,
                  " entries, indices[", i, "] ", selected);
  if (selected == 0) return {nullptr, 0};
  return {indices.const_data_ptr(), index_bytes(indices)};
}

struct NamedList {
  const char* name;
  const TensorList& list;
};

// One entry for each of n parameters in every list; optional ones may be empty.
inline void check_lists(size_t n, std::initializer_list<NamedList> lists,
                        std::initializer_list<NamedList> optional) {
  for (const auto& [name, list] : lists) {
    STD_TORCH_CHECK(list.size() == n, name, " has ", list.size(), " entries, params ", n,
                    ": pass one for each parameter");
  }
  for (const auto& [name, list] : optional) {
    STD_TORCH_CHECK(list.empty() || list.size() == n, name, " has ", list.size(),
                    " entries, params ", n, ": pass one for each parameter, or none");
  }
}

inline bool skipped(const std::optional<Tensor>& found_inf) {
  return found_inf.has_value() && scalar(*found_inf, "found_inf") != 0;
}

inline double grad_divisor(const std::optional<Tensor>& grad_scale, bool maximize) {
  const double scale = grad_scale.has_value() ? scalar(*grad_scale, "grad_scale") : 1;
  return maximize ? -scale : scale;
}

}  // namespace fishkern::adamw
