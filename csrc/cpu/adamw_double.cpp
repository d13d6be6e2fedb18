// AdamW in float64, for float64 parameters or state: plain code, for tests and rare users.

#include <cmath>

#include "cpu/adamw_entries.h"

namespace fishkern::adamw {
namespace {

double load(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(data)[i];
    case Dtype::bfloat16:
      return to_float(static_cast<const BFloat16*>(data)[i]);
    case Dtype::float16:
      return to_float(static_cast<const Float16*>(data)[i]);
    case Dtype::float64:
      return static_cast<const double*>(data)[i];
    case Dtype::uint8:
      break;  // refused before
  }
  __builtin_unreachable();
}

void store(void* data, Dtype dtype, int64_t i, double x) {
  switch (dtype) {
    case Dtype::float32:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      return;
    case Dtype::bfloat16:
      round_to(static_cast<BFloat16*>(data)[i], static_cast<float>(x));
      return;
    case Dtype::float16:
      round_to(static_cast<Float16*>(data)[i], static_cast<float>(x));
      return;
    case Dtype::float64:
      static_cast<double*>(data)[i] = x;
      return;
    case Dtype::uint8:
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
