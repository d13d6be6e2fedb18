#include "cpu/depthwise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/tensors.h"

namespace fishkern::depthwise {
namespace {

// Outputs that are computed together: their channels share cache lines where channels come last.
constexpr int64_t kOutputs = 16;

// Fewer multiplications than this are not worth another thread.
constexpr int64_t kGrain = 1 << 19;

}  // namespace

void compute(const Problem& problem, float* scores, int64_t stride) {
  const int64_t outputs = problem.grad.size, parts = (outputs + kOutputs - 1) / kOutputs;
  std::vector<double> part_scores(scores ? parts * problem.samples : 0);
  const auto add_outputs = FISHKERN_FOR_THIS_CPU(add_outputs);
  const int64_t scratch_size = (*FISHKERN_FOR_THIS_CPU(scratch_size))(problem, kOutputs);
  const int64_t* positions = problem.window.outputs;
  const int64_t work = problem.samples * problem.calls * positions[0] * positions[1] *
                       positions[2] * problem.entries() * kOutputs;
  torch::stable::parallel_for(
      0, parts, kGrain / std::max<int64_t>(work, 1) + 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch = new_scratch(scratch_size);
        for (int64_t part = begin; part < end; ++part)
          add_outputs(problem, part * kOutputs, std::min((part + 1) * kOutputs, outputs),
                      scores ? part_scores.data() + part * problem.samples : nullptr,
                      scratch.get());
      });
  for (int64_t n = 0; scores && n < problem.samples; ++n) {  // the parts' in their order
    double score = 0.0;
    for (int64_t part = 0; part < parts; ++part) score += part_scores[part * problem.samples + n];
    scores[n * stride] += static_cast<float>(score);
  }
}

}  // namespace fishkern::depthwise
