// Exact top-k over a list of tensors: no concatenation, no sort, no copy of the scores.
//
// Floats become integers of the same order (simd/topk.h), and the k-th largest of these is found
// by two histograms, of the upper and of the lower half of their bits. A counting pass then says
// how many positions each chunk of the scores contributes, and a last pass writes them. All that
// threads share is a sum of integers or has its place fixed beforehand: the result does not
// depend on their number.

#include "cpu/simd/topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

namespace fishkern::topk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 15;   // scores per unit of work: 128 KiB, which stay in cache
constexpr int64_t kSample = 1 << 15;  // scores that the first guess is made from

// A run of scores within one tensor, and how many of them lie above and at the threshold.
struct Chunk {
  int64_t tensor, begin, size;
  int64_t above = 0, equal = 0;
  int64_t offset = 0;  // of its first position in the tensor's result
};

// One tensor's scores in flat order.
class View {
 public:
  explicit View(const Tensor& tensor)
      : data_(static_cast<const float*>(tensor.const_data_ptr())),
        size_(tensor.numel()),
        contiguous_(tensor.is_contiguous()),
        sizes_(tensor.sizes().begin(), tensor.sizes().end()),
        strides_(tensor.strides().begin(), tensor.strides().end()) {}

  int64_t size() const { return size_; }

  // The scores [begin, begin + size): in place, or gathered into the buffer where they are strided.
  const float* read(int64_t begin, int64_t size, std::vector<float>& buffer) const {
    if (contiguous_) return data_ + begin;
    std::vector<int64_t> position(sizes_.size());
    int64_t offset = 0;
    for (size_t d = sizes_.size(); d-- > 0; begin /= sizes_[d]) {
      position[d] = begin % sizes_[d];
      offset += position[d] * strides_[d];
    }
    buffer.resize(size);
    const size_t last = sizes_.size() - 1;
    for (int64_t i = 0; i < size;) {
      const int64_t run = std::min(size - i, sizes_[last] - position[last]);
      for (int64_t j = 0; j < run; ++j) buffer[i + j] = data_[offset + j * strides_[last]];
      i += run;
      offset += run * strides_[last];
      position[last] += run;
      for (size_t d = last; d > 0 && position[d] == sizes_[d]; --d) {  // carry
        offset += strides_[d - 1] - sizes_[d] * strides_[d];
        position[d] = 0;
        ++position[d - 1];
      }
    }
    return buffer.data();
  }

 private:
  const float* data_;
  int64_t size_;
  bool contiguous_;
  std::vector<int64_t> sizes_, strides_;
};

struct Scores {
  std::vector<View> views;
  std::vector<Chunk> chunks;
  int64_t total = 0;

  explicit Scores(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "the native topk_indices takes float32 scores, not ",
                      torch::headeronly::toString(tensor.scalar_type()),
                      ": convert them, or run inside fishkern.use_backend(\"reference\")");
      const auto index = static_cast<int64_t>(views.size());
      const int64_t size = views.emplace_back(tensor).size();
      total += size;
      for (int64_t begin = 0; begin < size; begin += kChunk) {
        chunks.push_back({index, begin, std::min(kChunk, size - begin)});
      }
    }
  }

  // Calls visit(data, chunk) for the chunks [begin, end).
  template <typename Visit>
  void read(int64_t begin, int64_t end, Visit visit) {
    std::vector<float> buffer;
    for (int64_t i = begin; i < end; ++i) {
      Chunk& chunk = chunks[i];
      visit(views[chunk.tensor].read(chunk.begin, chunk.size, buffer), chunk);
    }
  }

  // Calls work(begin, end) for one range of chunks per thread.
  template <typename Work>
  void split(Work work) {
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 4, work);
  }
};

using Histogram = std::vector<int64_t>;
using Pass = decltype(&baseline::histogram_high);

// One histogram of all chunks.
Histogram histogram(Scores& scores, Pass pass, uint32_t argument) {
  Histogram total(kBins);
  std::mutex mutex;
  scores.split([&](int64_t begin, int64_t end) {
    Histogram own(kHistograms * kBins);
    scores.read(begin, end, [&](const float* data, Chunk& chunk) {
      pass(data, chunk.size, argument, own.data());
    });
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < kHistograms * kBins; ++i) total[i % kBins] += own[i];
  });
  return total;
}

// The bin that holds the k-th largest, counting from above, with k's rank inside it.
struct Place {
  uint32_t bin;
  int64_t rank;
};

std::optional<Place> find(const Histogram& histogram, int64_t k) {
  for (int64_t bin = kBins - 1; bin >= 0; k -= histogram[bin--]) {
    if (histogram[bin] >= k) return Place{static_cast<uint32_t>(bin), k};
  }
  return std::nullopt;
}

// A key that is probably a little below the k-th largest, from a sample of the scores. Most of
// them then need not be counted; a guess that is too high shows in the count.
uint32_t guess_floor(const Scores& scores, int64_t k) {
  if (scores.total < 16 * kSample) return 0;
  const int64_t step = scores.total / kSample | 1;  // odd: does not keep to a few columns
  std::vector<uint32_t> sample;
  std::vector<float> buffer;
  int64_t position = 0;
  for (const View& view : scores.views) {
    for (; position < view.size(); position += step) {
      sample.push_back(key(*view.read(position, 1, buffer)));
    }
    position -= view.size();
  }
  const double rank = static_cast<double>(k) * sample.size() / scores.total;
  const auto safe = static_cast<size_t>(rank + 6 * std::sqrt(rank) + 16);
  if (safe >= sample.size()) return 0;
  std::nth_element(sample.begin(), sample.begin() + safe, sample.end(), std::greater<>());
  return sample[safe];
}

// The key of the k-th largest score, k >= 1.
uint32_t find_threshold(Scores& scores, int64_t k) {
  std::optional<Place> high;
  for (uint32_t floor = guess_floor(scores, k); !high; floor = 0) {
    high = find(histogram(scores, FISHKERN_FOR_THIS_CPU(histogram_high), floor), k);
  }
  const auto low =
      find(histogram(scores, FISHKERN_FOR_THIS_CPU(histogram_low), high->bin), high->rank);
  return high->bin << 16 | low->bin;
}

std::vector<Tensor> topk_indices(std::vector<Tensor> tensors, int64_t k) {
  Scores scores(tensors);
  STD_TORCH_CHECK(0 <= k && k <= scores.total, "k is ", k, ", but there are ", scores.total,
                  " scores");
  std::vector<int64_t> counts(tensors.size(), 0);
  uint32_t threshold = 0;
  if (k > 0) {
    threshold = find_threshold(scores, k);
    const auto count_pass = FISHKERN_FOR_THIS_CPU(count);
    scores.split([&](int64_t begin, int64_t end) {
      scores.read(begin, end, [&](const float* data, Chunk& chunk) {
        count_pass(data, chunk.size, threshold, &chunk.above, &chunk.equal);
      });
    });
    // Ties: the first of the equal scores, in list order, make up k.
    int64_t ties = k;
    for (const Chunk& chunk : scores.chunks) ties -= chunk.above;
    for (Chunk& chunk : scores.chunks) {
      chunk.equal = std::min(chunk.equal, ties);
      ties -= chunk.equal;
      chunk.offset = counts[chunk.tensor];
      counts[chunk.tensor] += chunk.above + chunk.equal;
    }
  }

  std::vector<Tensor> indices;
  std::vector<int64_t*> outputs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    indices.push_back(torch::stable::new_empty(tensors[i], {counts[i]}, ScalarType::Long));
    outputs.push_back(static_cast<int64_t*>(indices.back().mutable_data_ptr()));
  }
  if (k > 0) {
    const auto write_pass = FISHKERN_FOR_THIS_CPU(write);
    scores.split([&](int64_t begin, int64_t end) {
      scores.read(begin, end, [&](const float* data, Chunk& chunk) {
        if (chunk.above + chunk.equal == 0) return;
        write_pass(data, chunk.size, threshold, chunk.equal, chunk.begin,
                   outputs[chunk.tensor] + chunk.offset);
      });
    });
  }
  return indices;
}

}  // namespace
}  // namespace fishkern::topk

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CPU, m) {
  m.impl("topk_indices", TORCH_BOX(&fishkern::topk::topk_indices));
}
