// masked_adamw_quantized_: masked_adamw_ with moments in bfloat16, or in bytes with a scale for
// each block of them. How they are read and stored is in cpu/simd/moments.h.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/adamw_metadata.h"

namespace fishkern::adamw {
namespace {

Dtype moments_dtype(TensorRef moments, const char* name, size_t i) {
  if (moments.is_dtype(aoti_torch_dtype_uint8)) return Dtype::uint8;
  STD_TORCH_CHECK(moments.is_dtype(aoti_torch_dtype_bfloat16), name, "[", i,
                  "] is neither bfloat16 nor uint8");
  return Dtype::bfloat16;
}

void* state_data(TensorRef tensor, int64_t count, const char* name, size_t i) {
  STD_TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), name, "[", i,
                  "] must be contiguous with ", count, " entries");
  return tensor.mutable_data_ptr();
}

// Null where the moments are no bytes and have none.
uint8_t* scale_data(const TensorList& scales, Dtype dtype, int64_t count, const char* name,
                    size_t i) {
  STD_TORCH_CHECK((dtype == Dtype::uint8) == !scales.empty(), name, " has ", scales.size(),
                  " entries: one for each tensor with moments in uint8, none for bfloat16");
  if (scales.empty()) return nullptr;
  STD_TORCH_CHECK(scales[i].is_dtype(aoti_torch_dtype_uint8), name, "[", i, "] is not uint8");
  const int64_t blocks = (count + kScaleBlock - 1) / kScaleBlock;
  return static_cast<uint8_t*>(state_data(scales[i], blocks, name, i));
}

}  // namespace

void masked_adamw_quantized_(const TensorList& params, const TensorList& grads,
                             const TensorList& indices, const TensorList& exp_avgs,
                             const TensorList& exp_avg_sqs, const TensorList& exp_avg_scales,
                             const TensorList& exp_avg_sq_scales, const TensorList& masters,
                             const Tensor& steps, const Tensor& lr, double beta1, double beta2,
                             double eps, double weight_decay, bool maximize,
                             const std::optional<Tensor>& grad_scale,
                             const std::optional<Tensor>& found_inf) {
  if (skipped(found_inf)) return;
  const size_t n = params.size();
  check_lists(n,
              {{"grads", grads},
               {"indices", indices},
               {"exp_avgs", exp_avgs},
               {"exp_avg_sqs", exp_avg_sqs}},
              {{"exp_avg_scales", exp_avg_scales},
               {"exp_avg_sq_scales", exp_avg_sq_scales},
               {"masters", masters}});
  Steps step(
      steps, n,
      {scalar(lr, "lr"), beta1, beta2, eps, weight_decay, grad_divisor(grad_scale, maximize)});
  std::vector<Entries> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = exp_avgs[i].numel();
    const Positions where = positions_of(indices[i], count, i);
    if (count == 0) continue;
    const Values param(params[i], "params", i);
    STD_TORCH_CHECK(param.dtype != Dtype::float64, "params[", i,
                    "] is float64, which has no moments in fewer bits");
    Run& run =
        all.emplace_back(entries_of(param, {grads[i], "grads", i}, where, count, step[i], i)).run;
    run.state_dtype = moments_dtype(exp_avgs[i], "exp_avgs", i);
    STD_TORCH_CHECK(moments_dtype(exp_avg_sqs[i], "exp_avg_sqs", i) == run.state_dtype, "exp_avgs[",
                    i, "] and exp_avg_sqs[", i, "] have different dtypes");
    run.exp_avg = state_data(exp_avgs[i], count, "exp_avgs", i);
    run.exp_avg_sq = state_data(exp_avg_sqs[i], count, "exp_avg_sqs", i);
    run.exp_avg_scale = scale_data(exp_avg_scales, run.state_dtype, count, "exp_avg_scales", i);
    run.exp_avg_sq_scale =
        scale_data(exp_avg_sq_scales, run.state_dtype, count, "exp_avg_sq_scales", i);
    if (masters.empty() || masters[i].numel() == 0) continue;
    STD_TORCH_CHECK(floating_dtype(masters[i], "masters", i) == Dtype::float32, "masters[", i,
                    "] is not float32");
    run.master = state_data(masters[i], count, "masters", i);
  }
  update_all(all);
}

}  // namespace fishkern::adamw

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("masked_adamw_quantized_",
         TORCH_BOX(&fishkern::WithLists<&fishkern::adamw::masked_adamw_quantized_>::call));
}
