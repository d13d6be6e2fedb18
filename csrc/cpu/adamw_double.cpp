// AdamW in float64, for float64 parameters or state: plain code, for tests and rare users.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "cpu/adamw_entries.h"

namespace fishkern::adamw {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

double load(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat:
      return static_cast<const float*>(data)[i];
    case Dtype::kBFloat16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case Dtype::kHalf:
      return static_cast<float>(static_cast<const Half*>(data)[i]);
    case Dtype::kDouble:
      return static_cast<const double*>(data)[i];
    case Dtype::kByte:
      break;  // refused before
  }
  __builtin_unreachable();
}

void store(void* data, Dtype dtype, int64_t i, double x) {
  switch (dtype) {
    case Dtype::kFloat:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      return;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(data)[i] = static_cast<float>(x);
      return;
    case Dtype::kHalf:
      static_cast<Half*>(data)[i] = static_cast<float>(x);
      return;
    case Dtype::kDouble:
      static_cast<double*>(data)[i] = x;
      return;
    case Dtype::kByte:
      return;
  }
}

}  // namespace

void update_in_double(const Run& run, const Step& step) {
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t at = position(run.param_at, i);
    const double g = load(run.grad, run.grad_dtype, position(run.grad_at, i)) / step.grad_divisor;
    double p =
        run.master ? load(run.master, run.state_dtype, i) : load(run.param, run.param_dtype, at);
    const double old = load(run.exp_avg, run.state_dtype, i);
    const double m = step.beta1 > 0.5 ? old + (1 - step.beta1) * (g - old)
                                      : g - step.beta1 * (g - old);  // as torch.lerp
    const double v =
        step.beta2 * load(run.exp_avg_sq, run.state_dtype, i) + (1 - step.beta2) * g * g;
    double second = v;
    if (run.max_exp_avg_sq) {
      const double largest = load(run.max_exp_avg_sq, run.state_dtype, i);
      if (largest > v || std::isnan(largest)) second = largest;
      store(run.max_exp_avg_sq, run.state_dtype, i, second);
    }
    p = p * step.decay - step.size * m / (std::sqrt(second) * step.rescale + step.eps);
    store(run.exp_avg, run.state_dtype, i, m);
    store(run.exp_avg_sq, run.state_dtype, i, v);
    if (run.master) store(run.master, run.state_dtype, i, p);
    store(run.param, run.param_dtype, at, p);
  }
}

}  // namespace fishkern::adamw
