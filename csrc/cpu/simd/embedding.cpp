// One block of columns of the embedding's Fisher accumulation.
#include "cpu/simd/embedding.h"

namespace fishkern::embedding::FISHKERN_ISA {
namespace {

// kUnit: neighbours in grad and in fisher are neighbours in memory.
template <typename T, bool kUnit>
[[gnu::always_inline]] inline void compute(const Problem& problem, int64_t block, int64_t width) {
  const Operand& grad = problem.grad;
  const int64_t begin = block * kBlock;
  const int64_t in_stride = kUnit ? 1 : grad.stride, out_stride = kUnit ? 1 : problem.col_stride;
  for (int64_t i = 0; i < problem.num_segments; ++i) {
    const Segment& segment = problem.segments[i];
    const T* rows = static_cast<const T*>(grad.data) + segment.sample * grad.sample_stride +
                    begin * grad.stride;
    float sum[kBlock];
    for (int64_t j = 0; j < width; ++j) sum[j] = 0.0f;
    for (int64_t k = segment.begin; k < segment.end; ++k) {
      const T* in = rows + problem.tokens[k] * grad.token_stride;
      for (int64_t j = 0; j < width; ++j) sum[j] += to_float(in[j * in_stride]);
    }
    for (int64_t j = 0; j < width; ++j) sum[j] *= sum[j];
    float* out = problem.fisher + segment.row * problem.row_stride + begin * problem.col_stride;
    for (int64_t j = 0; j < width; ++j) out[j * out_stride] += sum[j];
    if (!problem.scores) continue;
    double score = 0.0;
    for (int64_t j = 0; j < width; ++j) {
      const bool counts = !problem.mask || problem.mask[segment.row * problem.mask_row_stride +
                                                        (begin + j) * problem.mask_col_stride];
      if (counts) score += sum[j];
    }
    problem.scores[block * problem.samples + segment.sample] += score;
  }
}

}  // namespace

void compute_block(const Problem& problem, int64_t block) {
  const int64_t rest = problem.grad.size - block * kBlock;
  with_type(problem.grad.dtype, [&]<typename T>(T) {
    if (problem.grad.stride != 1 || problem.col_stride != 1) {
      compute<T, false>(problem, block, rest < kBlock ? rest : kBlock);
    } else if (rest < kBlock) {
      compute<T, true>(problem, block, rest);
    } else {
      compute<T, true>(problem, block, kBlock);  // a width known to the compiler
    }
  });
}

}  // namespace fishkern::embedding::FISHKERN_ISA
