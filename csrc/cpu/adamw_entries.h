// Selected entries, whatever the dtypes and strides of their tensors; their sharing among threads.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/simd/adamw.h"
#include "cpu/tensor_list.h"

namespace fishkern::adamw {

template <class Pointer>
Pointer advance(Pointer data, int64_t bytes) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data ? static_cast<Byte*>(data) + bytes : nullptr;
}

// Where entry i of a run lies.
inline int64_t position(Positions where, int64_t i) {
  if (where.at == nullptr) return i;
  return where.bytes == 4 ? static_cast<const int32_t*>(where.at)[i]
                          : static_cast<const int64_t*>(where.at)[i];
}

// Sizes and strides; without dimensions where the tensor is contiguous.
struct Layout {
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;

  Layout() = default;
  explicit Layout(TensorRef tensor) {
    if (tensor.is_contiguous()) return;
    dim = tensor.dim();
    sizes = tensor.sizes();
    strides = tensor.strides();
  }

  bool contiguous() const { return dim == 0; }

  int64_t offset(int64_t flat) const {
    if (contiguous()) return flat;
    int64_t result = 0;
    for (int64_t d = dim - 1; d >= 0; --d) {
      const int64_t rest = flat / sizes[d];
      result += (flat - rest * sizes[d]) * strides[d];
      flat = rest;
    }
    return result;
  }
};

// All selected entries of one tensor.
struct Entries {
  Run run;
  Step step;
  Layout param_layout, grad_layout;
  bool grad_selected;  // the gradient holds the selected entries only
};

// One step for all of them, by as many threads as torch has; the result depends on none of it.
void update_all(const std::vector<Entries>& all);

}  // namespace fishkern::adamw
