#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <vector>
using torch::stable::Tensor;
namespace {
void masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> indices,
  std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> masters,
  Tensor steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
  std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
}
}
STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) { m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_)); }
