// One channel's plane is copied with its padding, and the gradient's plane beside it with rows of
// the same length and zeros between them. Then what an entry of the kernel sees at all positions
// lies at one distance from the gradient, and its sum is one long dot product. With a stride, the
// plane is split into planes of every stride-th element, of which an entry sees one.
#include "cpu/simd/depthwise.h"

#include "cpu/simd/lanes.h"
#include "cpu/simd/vector.h"

namespace fishkern::depthwise::FISHKERN_ISA {
namespace {

// So many entries of the kernel share the loads of the gradient.
constexpr int kEntries = 8;

int64_t rounded(int64_t size) { return (size + kWidth - 1) / kWidth * kWidth; }

// How the planes lie in the scratch memory.
struct Planes {
  int64_t rows[3];           // of a plane: its extent in each dimension
  int64_t size, count, run;  // of a plane, of planes, of the gradient up to its last element

  explicit Planes(const Window& window) : size(1), count(1), run(0) {
    for (int d = 0; d < 3; ++d) {
      const int64_t reach = (window.outputs[d] - 1) * window.stride[d] +
                            (window.kernel[d] - 1) * window.dilation[d] + 1;
      rows[d] = (reach + window.stride[d] - 1) / window.stride[d];
      size *= rows[d], count *= window.stride[d];
      run = run * rows[d] + window.outputs[d] - 1;
    }
    ++run;
  }

  // Where the element at these coordinates lies, of the input with its padding.
  int64_t place(const Window& window, const int64_t (&i)[3]) const {
    int64_t plane = 0, within = 0;
    for (int d = 0; d < 3; ++d) {
      plane = plane * window.stride[d] + i[d] % window.stride[d];
      within = within * rows[d] + i[d] / window.stride[d];
    }
    return plane * size + within;
  }

  // Vectors are read from up to the last place on: a vector's length beyond the planes.
  int64_t input_size() const { return rounded(size * count + kWidth); }
  int64_t grad_size() const { return rounded(run); }
};

// The last dimension of the window's two inputs is copied row by row; what lies between stays zero.
template <typename T>
void copy_input(const Window& window, const Planes& planes, const T* in, float* out) {
  const int64_t stride = window.stride[2], step = window.steps[2];
  int64_t reach[3];
  for (int d = 0; d < 3; ++d)
    reach[d] = (window.outputs[d] - 1) * window.stride[d] +
               (window.kernel[d] - 1) * window.dilation[d] + 1 - window.padding[d];
  const auto end = [&](int d) { return reach[d] < window.inputs[d] ? reach[d] : window.inputs[d]; };
  for (int64_t i0 = 0; i0 < end(0); ++i0) {
    for (int64_t i1 = 0; i1 < end(1); ++i1) {
      const T* row = in + i0 * window.steps[0] + i1 * window.steps[1];
      for (int64_t r = 0; r < stride; ++r) {  // every stride-th element, from the padding's r-th on
        const int64_t first = ((r - window.padding[2]) % stride + stride) % stride;
        const int64_t at[3] = {i0 + window.padding[0], i1 + window.padding[1],
                               first + window.padding[2]};
        float* to = out + planes.place(window, at);
        if (stride == 1 && step == 1) {
          for (int64_t i = 0; i < end(2); ++i) to[i] = to_float(row[i]);
        } else {
          for (int64_t i = first; i < end(2); i += stride) *to++ = to_float(row[i * step]);
        }
      }
    }
  }
}

template <typename T>
void copy_grad(const Window& window, const Planes& planes, const T* in, int64_t step, float* out) {
  for (int64_t p0 = 0; p0 < window.outputs[0]; ++p0) {
    for (int64_t p1 = 0; p1 < window.outputs[1]; ++p1) {
      float* to = out + (p0 * planes.rows[1] + p1) * planes.rows[2];
      if (step == 1) {
        for (int64_t p = 0; p < window.outputs[2]; ++p) to[p] = to_float(in[p]);
      } else {
        for (int64_t p = 0; p < window.outputs[2]; ++p) to[p] = to_float(in[p * step]);
      }
      in += window.outputs[2] * step;
    }
  }
}

// sums[j] += sum_i grad[i] x[shifts[j] + i].
void add_products(const float* grad, const float* x, const int64_t* shifts, int64_t size,
                  float* sums) {
  Vec total[kEntries] = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vec g = load(grad + i);
    for (int j = 0; j < kEntries; ++j)
      total[j] = multiply_add(g, load(x + shifts[j] + i), total[j]);
  }
  float found[kEntries];
  for (int j = 0; j < kEntries; j += 4) sum_lanes(total + j, found + j);
  for (int j = 0; j < kEntries; ++j) sums[j] += found[j];
}

float sum_of(const float* values, int64_t size) {
  Vec total[4] = {};
  for (int64_t i = 0; i < size; i += kWidth) total[0] += load(values + i);
  float sums[4];
  sum_lanes(total, sums);
  return sums[0];
}

int64_t entries_rounded(const Problem& problem) {
  return (problem.entries() + kEntries - 1) / kEntries * kEntries;
}

}  // namespace

int64_t scratch_size(const Problem& problem, int64_t count) {
  const Planes planes(problem.window);
  return planes.input_size() + planes.grad_size() + entries_rounded(problem) * (count + 1) + count +
         2 * entries_rounded(problem);
}

void add_outputs(const Problem& problem, int64_t begin, int64_t end, double* scores,
                 float* scratch) {
  const Window& window = problem.window;
  const Planes planes(window);
  const int64_t num_entries = problem.entries(), width = entries_rounded(problem);
  const int64_t positions = window.outputs[0] * window.outputs[1] * window.outputs[2];
  float* const x = scratch;
  float* const grad = x + planes.input_size();
  float* const sums = grad + planes.grad_size();
  float* const totals = sums + width;  // of each output
  float* const biases = totals + width * (end - begin);
  int64_t* const shifts = reinterpret_cast<int64_t*>(biases + (end - begin + 1) / 2 * 2);
  for (float* p = scratch; p < reinterpret_cast<float*>(shifts); ++p) *p = 0.0f;
  for (int64_t k = 0; k < width; ++k) {
    int64_t left = k < num_entries ? k : 0, at[3];
    for (int d = 2; d >= 0; --d) {
      at[d] = left % window.kernel[d] * window.dilation[d];
      left /= window.kernel[d];
    }
    shifts[k] = planes.place(window, at);
  }
  for (int64_t n = 0; n < problem.samples; ++n) {
    for (int64_t o = begin; o < end; ++o) {
      float bias_sum = 0.0f;
      for (int64_t k = 0; k < width; ++k) sums[k] = 0.0f;
      for (int64_t call = 0; call < problem.calls; ++call) {
        with_type(problem.x_dtype, [&]<typename T>(T) {
          copy_input(window, planes,
                     static_cast<const T*>(problem.x) + n * problem.x_sample_stride +
                         call * window.call_step + o / problem.multiplier * window.channel_step,
                     x);
        });
        with_type(problem.grad.dtype, [&]<typename T>(T) {
          copy_grad(window, planes,
                    static_cast<const T*>(problem.grad.data) + n * problem.grad.sample_stride +
                        call * positions * problem.grad.token_stride + o * problem.grad.stride,
                    problem.grad.token_stride, grad);
        });
        for (int64_t k = 0; k < width; k += kEntries)
          add_products(grad, x, shifts + k, planes.grad_size(), sums + k);
        if (problem.bias) bias_sum += sum_of(grad, planes.grad_size());
      }
      float* const total = totals + (o - begin) * width;
      double score = 0.0;
      for (int64_t k = 0; k < num_entries; ++k) {
        const float square = sums[k] * sums[k];
        total[k] += square;
        if (scores && (!problem.mask ||
                       problem.mask[o * problem.mask_row_stride + k * problem.mask_col_stride]))
          score += square;
      }
      biases[o - begin] += bias_sum * bias_sum;
      if (scores) scores[n] += score;
    }
  }
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t k = 0; k < num_entries; ++k)
      problem.fisher[o * problem.row_stride + k * problem.col_stride] +=
          totals[(o - begin) * width + k];
    if (problem.bias) problem.bias[o * problem.bias_stride] += biases[o - begin];
  }
}

}  // namespace fishkern::depthwise::FISHKERN_ISA
