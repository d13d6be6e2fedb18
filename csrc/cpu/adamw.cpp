// masked_adamw_: read the tensors' metadata and check it before anything is changed. Sharing the
// entries out to threads is in cpu/adamw_entries.cpp, the arithmetic in cpu/simd/adamw.cpp.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/adamw_metadata.h"

namespace fishkern::adamw {

void masked_adamw_(const TensorList& params, const TensorList& grads, const TensorList& indices,
                   const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                   const TensorList& max_exp_avg_sqs, const TensorList& masters,
                   const Tensor& steps, const Tensor& lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = params.size();
  check_lists(n,
              {{"grads", grads},
               {"indices", indices},
               {"exp_avgs", exp_avgs},
               {"exp_avg_sqs", exp_avg_sqs}},
              {{"max_exp_avg_sqs", max_exp_avg_sqs}, {"masters", masters}});
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
    std::optional<TensorRef> v_max, master;
    if (!max_exp_avg_sqs.empty()) v_max = max_exp_avg_sqs[i];
    if (!masters.empty() && masters[i].numel() != 0) master = masters[i];
    State(exp_avgs[i], exp_avg_sqs[i], v_max, master, count, i).assign(entries.run, 0);
  }
  update_all(all);
}

// The same with the state of all tensors in one: that of tensor i are the entries from offsets[i]
// to offsets[i + 1]. The indices lie packed too, but a tensor with as many entries as it has
// numbers takes none. `steps_before` counts the steps before this one, and is raised.
void masked_adamw_packed_(const TensorList& params, const TensorList& grads, const Tensor& offsets,
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
  STD_TORCH_CHECK(offsets.numel() == static_cast<int64_t>(n) + 1 && offsets.is_contiguous() &&
                      TensorRef(offsets).is_dtype(aoti_torch_dtype_int64),
                  "offsets must be a contiguous int64 tensor with ", n + 1, " entries");
  const auto* offset = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t total = exp_avg.numel();
  STD_TORCH_CHECK(offset[0] == 0 && offset[n] == total, "offsets must run from 0 to ", total,
                  ", the number of entries in exp_avg");
  const State state(exp_avg, exp_avg_sq, max_exp_avg_sq, master, total, 0);
  Steps step(
      steps_before, n,
      {scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)},
      true);
  const Positions packed{indices.const_data_ptr(), index_bytes(indices)};
  const int64_t stored = indices.numel();
  std::vector<Entries> all;
  all.reserve(n);
  int64_t used = 0;
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = offset[i + 1] - offset[i];
    STD_TORCH_CHECK(count >= 0, "offsets must not descend, but do at ", i);
    if (count == 0) continue;
    const Values param(params[i], "params", i);
    Positions where{nullptr, 0};
    if (count != param.numel) {
      where = {advance(packed.at, used * packed.bytes), packed.bytes};
      used += count;
      STD_TORCH_CHECK(used <= stored, "indices has ", stored, " entries, too few for params[", i,
                      "]");
    }
    Entries& entries =
        all.emplace_back(entries_of(param, {grads[i], "grads", i}, where, count, step[i], i));
    state.assign(entries.run, offset[i]);
  }
  STD_TORCH_CHECK(used == stored, "indices has ", stored, " entries, of which ", used, " are used");
  step.write();
  update_all(all);
}

}  // namespace fishkern::adamw

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&fishkern::WithLists<&fishkern::adamw::masked_adamw_>::call));
  m.impl("masked_adamw_packed_",
         TORCH_BOX(&fishkern::WithLists<&fishkern::adamw::masked_adamw_packed_>::call));
}
