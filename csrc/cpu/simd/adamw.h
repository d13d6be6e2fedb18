// AdamW on a run of entries: what the variants in simd/adamw.cpp compute, and from what.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/simd/dtypes.h"

namespace fishkern::adamw {

// So many moments in 8 bits share a scale, and are therefore updated by one thread.
constexpr int64_t kScaleBlock = 32;

// Where the entries of a run lie in a tensor: at at[0], at[1], ..., or side by side where null.
struct Positions {
  const void* at;
  int64_t bytes;  // of one position: 4 or 8
};

// `count` entries of one tensor. The state is contiguous, one number for each entry.
struct Run {
  int64_t count;
  void* param;
  const void* grad;
  Dtype param_dtype, grad_dtype, state_dtype;
  Positions param_at, grad_at;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;    // null: no AMSGrad
  void* master;            // the parameter in full precision; null: the parameter is its own
  uint8_t* exp_avg_scale;  // of each kScaleBlock entries, where the moments are bytes
  uint8_t* exp_avg_sq_scale;
  int64_t first;  // which of the tensor's selected entries the run begins with
};

// The numbers of one step, the bias corrections folded in, in double until they are used.
struct Step {
  double decay;  // 1 - lr weight_decay
  double beta1;
  double beta2;
  double eps;
  double size;          // lr / (1 - beta1^step)
  double rescale;       // 1 / sqrt(1 - beta2^step)
  double grad_divisor;  // the gradient scale; negative in order to maximize
  uint32_t number;      // of the step, counted from 1
};

// In float32; neither parameter nor state may be float64. With moments in bytes, runs begin at
// multiples of kScaleBlock of their tensor's entries.
FISHKERN_DECLARE_FOR_EACH_ISA(void update(const Run& run, const Step& step);)

// In float64, any dtypes; plain code.
void update_in_double(const Run& run, const Step& step);

}  // namespace fishkern::adamw
