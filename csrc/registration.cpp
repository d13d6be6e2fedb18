// The schemas of the native ops; each kernel file registers its own implementation.
// They equal those in fishkern/_ops.py, as text (a test compares them).

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fishkern_native, m) {
  m.def(
      "linear_fisher_(Tensor(a!) fisher, Tensor x, Tensor grad_out, *, Tensor(b!)? "
      "bias_fisher=None, "
      "Tensor(c!)? sample_scores=None, Tensor? mask=None) -> ()");
  m.def(
      "embedding_fisher_(Tensor(a!) fisher, Tensor ids, Tensor grad_out, *, int? "
      "padding_idx=None, Tensor(b!)? sample_scores=None, Tensor? mask=None) -> ()");
  m.def(
      "norm_fisher_(Tensor(a!)? weight_fisher, Tensor(b!)? bias_fisher, Tensor? x_hat, "
      "Tensor grad_out, *, Tensor(c!)? sample_scores=None, Tensor? weight_mask=None, "
      "Tensor? bias_mask=None) -> ()");
  m.def(
      "conv_fisher_(Tensor(a!) fisher, Tensor x, Tensor grad_out, *, Tensor(b!)? "
      "bias_fisher=None, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor(c!)? sample_scores=None, Tensor? mask=None) -> ()");
  m.def(
      "linear_selected_grad_(Tensor(a!) selected_grad, Tensor x, Tensor grad_out, Tensor indices, "
      "*, Tensor? rows=None, Tensor? columns=None) -> ()");
  m.def("topk_indices(Tensor[] scores, SymInt k) -> Tensor[]");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
      "Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def(
      "masked_adamw_packed_(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor indices, "
      "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, Tensor(e!)? master, "
      "Tensor(f!) steps_before, Tensor lr, float beta1, float beta2, float eps, float "
      "weight_decay, "
      "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def(
      "masked_adamw_quantized_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, "
      "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_scales, "
      "Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] masters, "
      "Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}
