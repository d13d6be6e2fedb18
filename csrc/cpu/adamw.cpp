// masked_adamw_: read the tensors' metadata and check it before anything is changed. Sharing the
// entries out to threads is in cpu/adamw_entries.cpp, the arithmetic in cpu/simd/adamw.cpp.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/adamw_metadata.h"

namespace fishkern::adamw {

void masked_adamw_(const Tensors& params, const Tensors& grads, const Tensors& indices,
                   const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& max_exp_avg_sqs, const Tensors& masters, const Tensor& steps,
                   const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                   bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = params.size();
  check_lists(n, {&grads, &indices, &exp_avgs, &exp_avg_sqs}, {&max_exp_avg_sqs, &masters});
  Steps step(
      steps, n,
      {scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)});
  std::vector<Entries> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = exp_avgs[i].numel();
    const Positions where = positions_of(indices[i], count, i);
    if (count == 0) continue;
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
// numbers takes none. `steps_before` counts the steps before this one, and is raised.
void masked_adamw_packed_(const Tensors& params, const Tensors& grads, const Tensor& offsets,
                          const Tensor& indices, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const std::optional<Tensor>& max_exp_avg_sq,
                          const std::optional<Tensor>& master, const Tensor& steps_before,
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
      max_exp_avg_sq, master, Steps(steps_before, n, options, true));
}

// The same for contiguous parameters and gradients that have the dtype of `param` and `grad`, by
// address: half of a small step is the reading of lists of tensors. Who calls it has looked at
// every tensor; `numels` counts the numbers of each parameter and of its gradient.
void masked_adamw_packed_at_(
    const Tensor& param, const Tensor& grad, const std::vector<int64_t>& param_at,
    const std::vector<int64_t>& grad_at, const std::vector<int64_t>& numels, const Tensor& offsets,
    const Tensor& indices, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& max_exp_avg_sq, const std::optional<Tensor>& master,
    const Tensor& steps_before, const Tensor& lr, double beta1, double beta2, double eps,
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
      exp_avg, exp_avg_sq, max_exp_avg_sq, master, Steps(steps_before, n, options, true));
}

}  // namespace fishkern::adamw

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&fishkern::adamw::masked_adamw_));
  m.impl("masked_adamw_packed_", TORCH_BOX(&fishkern::adamw::masked_adamw_packed_));
  m.impl("masked_adamw_packed_at_", TORCH_BOX(&fishkern::adamw::masked_adamw_packed_at_));
}
