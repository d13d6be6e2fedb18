// A list argument of an op, and its tensors without a torch::stable::Tensor for each: making and
// dropping that one's shared pointer takes longer than all the questions of a small step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <type_traits>
#include <vector>

namespace fishkern {

// A tensor that somebody else owns. Each question is a call through the C ABI: ask once.
class TensorRef {
 public:
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}
  TensorRef(const torch::stable::Tensor& tensor) : handle_(tensor.get()) {}
  TensorRef(torch::stable::Tensor&&) = delete;  // nobody would own it any more

  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  const int64_t* sizes() const { return ask<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }

  // By the numbers that functions such as aoti_torch_dtype_float32 give.
  bool is_dtype(int32_t (*dtype)()) const { return this->dtype() == dtype(); }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }

 private:
  template <class Answer, class Question>
  Answer ask(Question question) const {
    Answer answer{};
    TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }

  AtenTensorHandle handle_;
};

// What TORCH_BOX hands over for Tensor[]; who gets them has to drop them.
using Handles = std::vector<AtenTensorHandle>;

template <auto kernel>
struct WithLists;

// Drops the tensors at its end, so that only WithLists may make one, and one of each argument.
class TensorList {
 public:
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  TensorRef operator[](size_t i) const { return TensorRef(handles_[i]); }

 private:
  template <auto kernel>
  friend struct WithLists;
  TensorList(const Handles& handles) : handles_(handles) {}

  const Handles& handles_;
};

// A kernel that takes TensorLists, as TORCH_BOX wants it.
template <class... Args, void (*kernel)(Args...)>
struct WithLists<kernel> {
  template <class Arg>
  using Boxed = std::conditional_t<std::is_same_v<Arg, const TensorList&>, const Handles&, Arg>;
  static void call(Boxed<Args>... args) { kernel(args...); }
};

}  // namespace fishkern
