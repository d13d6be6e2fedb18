#include "cpu/adamw_entries.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace fishkern::adamw {
namespace {

// Fewer entries than this are not worth waking a thread for.
constexpr int64_t kGrain = 16384;
constexpr int64_t kBlock = 256;  // positions of a strided tensor that are worked out at a time

Run slice(const Run& run, int64_t begin, int64_t count) {
  const auto shift = [begin](Positions& where, auto& data, Dtype dtype) {
    if (where.at) {
      where.at = advance(where.at, begin * where.bytes);
    } else {
      data = advance(data, begin * bytes_of(dtype));
    }
  };
  Run part = run;
  part.count = count;
  shift(part.param_at, part.param, run.param_dtype);
  shift(part.grad_at, part.grad, run.grad_dtype);
  for (void** state : {&part.exp_avg, &part.exp_avg_sq, &part.max_exp_avg_sq}) {
    *state = advance(*state, begin * bytes_of(run.state_dtype));
  }
  part.master = advance(part.master, begin * (run.state_dtype == Dtype::float64 ? 8 : 4));
  for (uint8_t** scale : {&part.exp_avg_scale, &part.exp_avg_sq_scale}) {
    *scale = *scale ? *scale + begin / kScaleBlock : nullptr;
  }
  part.first = begin;
  return part;
}

void update_part(const Entries& entries, int64_t begin, int64_t count) {
  const Run& run = entries.run;
  const bool in_double = run.param_dtype == Dtype::float64 || run.state_dtype == Dtype::float64;
  const auto update = in_double ? &update_in_double : FISHKERN_FOR_THIS_CPU(update);
  if (entries.param_layout.contiguous() && entries.grad_layout.contiguous()) {
    return update(slice(run, begin, count), entries.step);
  }
  // Strided: the same, from positions worked out block by block.
  int64_t param_at[kBlock], grad_at[kBlock];
  for (const int64_t end = begin + count; begin < end; begin += kBlock) {
    Run part = slice(run, begin, std::min(kBlock, end - begin));
    for (int64_t i = 0; i < part.count; ++i) {
      const int64_t flat = position(run.param_at, begin + i);
      param_at[i] = entries.param_layout.offset(flat);
      grad_at[i] = entries.grad_layout.offset(entries.grad_selected ? begin + i : flat);
    }
    part.param = run.param;
    part.grad = run.grad;
    part.param_at = {param_at, 8};
    part.grad_at = {grad_at, 8};
    update(part, entries.step);
  }
}

int64_t whole_blocks(int64_t entries) { return entries / kScaleBlock * kScaleBlock; }

}  // namespace

// Threads get equal shares of all entries together, so that a large tensor is shared, between two
// entries with a scale of their own. The result does not depend on the shares.
void update_all(const std::vector<Entries>& all) {
  std::vector<int64_t> ends;
  ends.reserve(all.size());
  int64_t total = 0;
  for (const Entries& entries : all) ends.push_back(total += entries.run.count);
  if (total < 2 * kGrain) {
    for (const Entries& entries : all) update_part(entries, 0, entries.run.count);
    return;
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t first = ends[i] - all[i].run.count;
      const int64_t last = std::min(end, ends[i]);
      const int64_t from = whole_blocks(begin - first);
      const int64_t to = last == ends[i] ? last - first : whole_blocks(last - first);
      if (to > from) update_part(all[i], from, to - from);
      begin = std::max(begin, last);
    }
  });
}

}  // namespace fishkern::adamw
