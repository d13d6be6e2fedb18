// masked_adamw_: read the tensors' metadata and check it before anything is changed. Sharing the
// entries out to threads is in cpu/adamw_entries.cpp, the arithmetic in cpu/simd/adamw.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/adamw_entries.h"

namespace fishkern::adamw {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Metadata. Each question to a tensor is a call through the C ABI: ask once.

bool is_dtype(int32_t dtype, int32_t (*other)()) { return dtype == other(); }

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

Dtype floating_dtype(const Tensor& tensor, const char* name, size_t i) {
  const int32_t dtype = raw_dtype(tensor);
  if (is_dtype(dtype, aoti_torch_dtype_float32)) return Dtype::kFloat;
  if (is_dtype(dtype, aoti_torch_dtype_bfloat16)) return Dtype::kBFloat16;
  if (is_dtype(dtype, aoti_torch_dtype_float16)) return Dtype::kHalf;
  STD_TORCH_CHECK(is_dtype(dtype, aoti_torch_dtype_float64), name, "[", i,
                  "] is neither float32, bfloat16, float16 nor float64");
  return Dtype::kDouble;
}

// The state tensors: contiguous, of one dtype and length; the last two may be missing.
struct State {
  Dtype dtype;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  void* master;

  State(const Tensor& m, const Tensor& v, const Tensor* v_max, const Tensor* p, int64_t count,
        size_t i)
      : dtype(floating_dtype(m, "exp_avgs", i)),
        exp_avg(data(&m, count, "exp_avgs", i)),
        exp_avg_sq(data(&v, count, "exp_avg_sqs", i)),
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
  void* data(const Tensor* tensor, int64_t count, const char* name, size_t i) const {
    if (tensor == nullptr) return nullptr;
    STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() &&
                        floating_dtype(*tensor, name, i) == dtype &&
                        (dtype == Dtype::kFloat || dtype == Dtype::kDouble),
                    name, "[", i,
                    "] must be contiguous and float32 as the rest of the state, with ", count,
                    " entries");
    return tensor->mutable_data_ptr();
  }
};

double scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must hold one number");
  const int32_t dtype = raw_dtype(tensor);
  if (is_dtype(dtype, aoti_torch_dtype_float64)) {
    return *static_cast<const double*>(tensor.const_data_ptr());
  }
  STD_TORCH_CHECK(is_dtype(dtype, aoti_torch_dtype_float32), name,
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
            .grad_divisor = grad_divisor};
  }
};

// The steps of all tensors; most often they are equal, and two powers are worth saving.
class Steps {
 public:
  // `raise`: count this step, too, once all is known to be in order.
  Steps(const Tensor& steps, size_t n, const Options& options, bool raise = false)
      : options_(options), numel_(n), raise_(raise) {
    STD_TORCH_CHECK(steps.numel() == static_cast<int64_t>(n) && steps.is_contiguous() &&
                        is_dtype(raw_dtype(steps), aoti_torch_dtype_float32),
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

  Values(const Tensor& tensor, const char* name, size_t i)
      : data(tensor.mutable_data_ptr()),
        numel(tensor.numel()),
        dtype(floating_dtype(tensor, name, i)),
        layout(tensor) {}

  Values(int64_t address, int64_t n, Dtype type)
      : data(reinterpret_cast<void*>(address)), numel(n), dtype(type) {}
};

// One tensor's parameter and gradient; `indices` is null where every entry is selected.
Entries entries_of(const Values& param, const Values& grad, Positions indices, int64_t count,
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
                  .state_dtype = Dtype::kFloat,
                  .param_at = indices,
                  .grad_at = grad_selected ? Positions{nullptr, 0} : indices,
                  .exp_avg = nullptr,
                  .exp_avg_sq = nullptr,
                  .max_exp_avg_sq = nullptr,
                  .master = nullptr},
          .step = step,
          .param_layout = param.layout,
          .grad_layout = grad.layout,
          .grad_selected = grad_selected};
}

int64_t index_bytes(const Tensor& indices) {
  const int32_t dtype = raw_dtype(indices);
  const bool is_int = is_dtype(dtype, aoti_torch_dtype_int32);
  STD_TORCH_CHECK((is_int || is_dtype(dtype, aoti_torch_dtype_int64)) && indices.is_contiguous(),
                  "indices must be contiguous, int32 or int64");
  return is_int ? 4 : 8;
}

bool skipped(const std::optional<Tensor>& found_inf) {
  return found_inf.has_value() && scalar(*found_inf, "found_inf") != 0;
}

double grad_divisor(const std::optional<Tensor>& grad_scale, bool maximize) {
  const double scale = grad_scale.has_value() ? scalar(*grad_scale, "grad_scale") : 1;
  return maximize ? -scale : scale;
}

}  // namespace

void masked_adamw_(const Tensors& params, const Tensors& grads, const Tensors& indices,
                   const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& steps,
                   const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                   bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = params.size();
  for (const Tensors* list : {&grads, &indices, &exp_avgs, &exp_avg_sqs}) {
    STD_TORCH_CHECK(list->size() == n, "lists of different lengths: ", list->size(), " and ", n);
  }
  for (const Tensors* list : {&max_exp_avg_sqs, &masters}) {
    STD_TORCH_CHECK(list->empty() || list->size() == n, "an optional list has ", list->size(),
                    " entries, params ", n);
  }
  Steps step(
      steps, n,
      {scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)});
  std::vector<Entries> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = exp_avgs[i].numel();
    const int64_t selected = indices[i].numel();
    STD_TORCH_CHECK(selected == 0 || selected == count, "exp_avgs[", i, "] has ", count,
                    " entries, indices[", i, "] ", selected);
    if (count == 0) continue;
    Positions where{nullptr, 0};
    if (selected) where = {indices[i].const_data_ptr(), index_bytes(indices[i])};
    Entries& entries = all.emplace_back(
        entries_of({params[i], "params", i}, {grads[i], "grads", i}, where, count, step[i], i));
    const Tensor* v_max = max_exp_avg_sqs.empty() ? nullptr : &max_exp_avg_sqs[i];
    const Tensor* master = masters.empty() || masters[i].numel() == 0 ? nullptr : &masters[i];
    State(exp_avgs[i], exp_avg_sqs[i], v_max, master, count, i).assign(entries.run, 0);
  }
  update_all(all);
}

namespace {

// What the two packed forms share; params[i] and grads[i] are Values.
template <class Params, class Grads>
void update_packed(size_t n, const Params& params, const Grads& grads, const Tensor& offsets,
                   const Tensor& indices, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                   const std::optional<Tensor>& max_exp_avg_sq, const std::optional<Tensor>& master,
                   Steps step) {
  STD_TORCH_CHECK(offsets.numel() == static_cast<int64_t>(n) + 1 && offsets.is_contiguous() &&
                      is_dtype(raw_dtype(offsets), aoti_torch_dtype_int64),
                  "offsets must be a contiguous int64 tensor with ", n + 1, " entries");
  const auto* offset = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t total = exp_avg.numel();
  STD_TORCH_CHECK(offset[0] == 0 && offset[n] == total, "offsets must run from 0 to ", total,
                  ", the number of entries in exp_avg");
  const State state(exp_avg, exp_avg_sq, max_exp_avg_sq ? &*max_exp_avg_sq : nullptr,
                    master ? &*master : nullptr, total, 0);
  const Positions packed{indices.const_data_ptr(), index_bytes(indices)};
  const int64_t stored = indices.numel();
  std::vector<Entries> all;
  all.reserve(n);
  int64_t used = 0;
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = offset[i + 1] - offset[i];
    STD_TORCH_CHECK(count >= 0, "offsets must not descend, but do at ", i);
    if (count == 0) continue;
    const Values param = params(i);
    Positions where{nullptr, 0};
    if (count != param.numel) {
      where = {advance(packed.at, used * packed.bytes), packed.bytes};
      used += count;
      STD_TORCH_CHECK(used <= stored, "indices has ", stored, " entries, too few for params[", i,
                      "]");
    }
    Entries& entries = all.emplace_back(entries_of(param, grads(i), where, count, step[i], i));
    state.assign(entries.run, offset[i]);
  }
  STD_TORCH_CHECK(used == stored, "indices has ", stored, " entries, of which ", used, " are used");
  step.write();
  update_all(all);
}

}  // namespace

// The same with the state of all tensors in one: that of tensor i are the entries from offsets[i]
// to offsets[i + 1]. The indices lie packed too, but a tensor with as many entries as it has
// numbers takes none. `steps` counts the steps before this one, and is raised.
void masked_adamw_packed_(const Tensors& params, const Tensors& grads, const Tensor& offsets,
                          const Tensor& indices, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const std::optional<Tensor>& max_exp_avg_sq,
                          const std::optional<Tensor>& master, const Tensor& steps,
                          const Tensor& lr, double beta1, double beta2, double eps,
                          double weight_decay, bool maximize,
                          const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n, "grads has ", grads.size(), " entries, params ", n);
  const Options options{
      scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)};
  update_packed(
      n, [&](size_t i) { return Values(params[i], "params", i); },
      [&](size_t i) { return Values(grads[i], "grads", i); }, offsets, indices, exp_avg, exp_avg_sq,
      max_exp_avg_sq, master, Steps(steps, n, options, true));
}

// The same for contiguous parameters and gradients that have the dtype of `param` and `grad`, by
// address: half of a small step is the reading of lists of tensors. Who calls it has looked at
// every tensor; `numels` counts the numbers of each parameter and of its gradient.
void masked_adamw_packed_at_(
    const Tensor& param, const Tensor& grad, const std::vector<int64_t>& param_at,
    const std::vector<int64_t>& grad_at, const std::vector<int64_t>& numels, const Tensor& offsets,
    const Tensor& indices, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& max_exp_avg_sq, const std::optional<Tensor>& master,
    const Tensor& steps, const Tensor& lr, double beta1, double beta2, double eps,
    double weight_decay, bool maximize, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = numels.size();
  STD_TORCH_CHECK(param_at.size() == n && grad_at.size() == n,
                  "param_at, grad_at and numels have different lengths: ", param_at.size(), ", ",
                  grad_at.size(), " and ", n);
  const Options options{
      scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)};
  const Dtype param_dtype = floating_dtype(param, "params", 0);
  const Dtype grad_dtype = floating_dtype(grad, "grads", 0);
  update_packed(
      n, [&](size_t i) { return Values(param_at[i], numels[i], param_dtype); },
      [&](size_t i) { return Values(grad_at[i], numels[i], grad_dtype); }, offsets, indices,
      exp_avg, exp_avg_sq, max_exp_avg_sq, master, Steps(steps, n, options, true));
}

}  // namespace fishkern::adamw

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&fishkern::adamw::masked_adamw_));
  m.impl("masked_adamw_packed_", TORCH_BOX(&fishkern::adamw::masked_adamw_packed_));
  m.impl("masked_adamw_packed_at_", TORCH_BOX(&fishkern::adamw::masked_adamw_packed_at_));
}
