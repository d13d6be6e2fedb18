// AdamW on a run of entries, one block at a time: gather the parameter and the gradient into
// float32 buffers that stay in the first-level cache, update them with full vectors, scatter the
// parameter back. What is float32 and side by side already is updated where it lies.
//
// Multiplications and additions are never contracted, so every instruction set and every way to
// split the work gives the same bits.

#include "cpu/simd/adamw.h"

#include "cpu/simd/moments.h"
#include "cpu/simd/vector.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace fishkern::adamw::FISHKERN_ISA {
namespace {

constexpr int64_t kBlock = 128;
// So many entries ahead of its use a cache line is asked for: far enough to cover the latency of
// memory, near enough not to drop out of the first-level cache. The state is read in order, which
// the processor foresees by itself but for the start of each page.
constexpr int64_t kAhead = 96;
constexpr int64_t kStateAhead = 256;

// Nothing from the standard library's headers: an inline function of theirs would be compiled once
// per instruction set, and the linker would keep any one of them.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)x);
#else
  for (int64_t i = 0; i < kWidth; ++i) {
    x[i] = __builtin_sqrtf(x[i]);
  }
  return x;
#endif
}

// A number on its own: to_float is written for vectors.
template <class T>
inline float gathered(T x) {
  return to_float(x);
}

#if defined(__F16C__)
inline float gathered(Float16 x) { return _cvtsh_ss(x.bits); }
#endif

// Gradients may be float64, too.
template <class Function>
void with_grad_type(Dtype dtype, const Function& function) {
  if (dtype == Dtype::float64) return function(double{});
  with_type(dtype, function);
}

template <class Function>
void with_positions(Positions where, const Function& function) {
  if (where.bytes == 4) return function(static_cast<const int32_t*>(where.at));
  function(static_cast<const int64_t*>(where.at));
}

// The entries [begin, begin + n) of a tensor as floats.
void read(float* to, const void* data, Dtype dtype, Positions where, int64_t begin, int64_t n) {
  with_grad_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(data);
    if (where.at == nullptr) {
      for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[begin + i]);
    } else {
      with_positions(where, [&](const auto* at) {
        for (int64_t i = 0; i < n; ++i) to[i] = gathered(from[at[begin + i]]);
      });
    }
  });
}

void write(const float* from, void* data, Dtype dtype, Positions where, int64_t begin, int64_t n) {
  with_type(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(data);
    if (where.at == nullptr) {
      for (int64_t i = 0; i < n; ++i) round_to(to[begin + i], from[i]);
    } else {
      with_positions(where, [&](const auto* at) {
        for (int64_t i = 0; i < n; ++i) round_to(to[at[begin + i]], from[i]);
      });
    }
  });
}

// Whether n entries lie so close together that the processor foresees their lines by itself.
template <class Index>
inline bool is_stream(const Index* at, int64_t n) {
  return at[n - 1] - at[0] < 4 * n;
}

// Parameter and gradient from the same positions; the lines of later entries are asked for ahead
// of their use, except where they lie so close that the processor sees a plain stream.
template <class Param, class Grad, class Index>
void gather_both(float* p, const Param* param, float* g, const Grad* grad, const Index* at,
                 int64_t n, int64_t left) {
  int64_t i = 0;
  for (const int64_t end = is_stream(at, n) ? 0 : smaller(n, left - kAhead); i < end; ++i) {
    __builtin_prefetch(param + at[i + kAhead]);
    __builtin_prefetch(grad + at[i + kAhead]);
    p[i] = gathered(param[at[i]]);
    g[i] = gathered(grad[at[i]]);
  }
  for (; i < n; ++i) {
    p[i] = gathered(param[at[i]]);
    g[i] = gathered(grad[at[i]]);
  }
}

void read_both(float* p, float* g, const Run& run, int64_t begin, int64_t n) {
  with_type(run.param_dtype, [&](auto param) {
    with_grad_type(run.grad_dtype, [&](auto grad) {
      with_positions(run.param_at, [&](const auto* at) {
        gather_both(p, static_cast<const decltype(param)*>(run.param), g,
                    static_cast<const decltype(grad)*>(run.grad), at + begin, n, run.count - begin);
      });
    });
  });
}

struct Arithmetic {
  float decay, beta2, weight1, weight2, eps, size, rescale, grad_divisor;
  bool near_old;  // lerp starts from its nearer end, as torch.lerp does

  explicit Arithmetic(const Step& step)
      : decay(step.decay),
        beta2(step.beta2),
        weight1(step.beta1 > 0.5 ? 1 - step.beta1 : -step.beta1),
        weight2(1 - step.beta2),
        eps(step.eps),
        size(step.size),
        rescale(step.rescale),
        grad_divisor(step.grad_divisor),
        near_old(step.beta1 > 0.5) {}

  // The new p; the moments are updated, the largest second one only where it is kept.
  inline Vec operator()(Vec p, Vec grad, Vec& exp_avg, Vec& exp_avg_sq, Vec* largest) const {
    if (grad_divisor != 1) {
      grad /= grad_divisor;
    }
    exp_avg = (near_old ? exp_avg : grad) + weight1 * (grad - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * (grad * grad);
    Vec second = exp_avg_sq;
    if (largest != nullptr) {
      second = (*largest > second) | (*largest != *largest) ? *largest : second;  // a NaN stays
      *largest = second;
    }
    const Vec denominator = square_root(second) * rescale + eps;
    return p * decay - size * exp_avg / denominator;
  }
};

// n entries that lie side by side; v_max may be null.
void update_block(const Arithmetic& arithmetic, float* p, const float* g, float* m, float* v,
                  float* v_max, int64_t n) {
  int64_t i = 0;
  const auto update = [&](const auto& load, const auto& store) {
    Vec exp_avg = load(m + i), exp_avg_sq = load(v + i), largest = v_max ? load(v_max + i) : Vec{};
    store(p + i,
          arithmetic(load(p + i), load(g + i), exp_avg, exp_avg_sq, v_max ? &largest : nullptr));
    store(m + i, exp_avg);
    store(v + i, exp_avg_sq);
    if (v_max) store(v_max + i, largest);
  };
  for (; i + kWidth <= n; i += kWidth) {
    __builtin_prefetch(m + i + kStateAhead);
    __builtin_prefetch(v + i + kStateAhead);
    update([](const float* from) { return load(from); }, [](float* to, Vec x) { store(to, x); });
  }
  if (const int64_t rest = n - i) {
    update([rest](const float* from) { return load_first(from, rest); },
           [rest](float* to, Vec x) { store_first(to, x, rest); });
  }
}

#if defined(__AVX512F__)
// Hardware's own gather and scatter are slow on some processors; sixteen loads nowhere.
inline Vec gather(const float* from, const int32_t* at) {
  return Vec{from[at[0]],  from[at[1]],  from[at[2]],  from[at[3]], from[at[4]],  from[at[5]],
             from[at[6]],  from[at[7]],  from[at[8]],  from[at[9]], from[at[10]], from[at[11]],
             from[at[12]], from[at[13]], from[at[14]], from[at[15]]};
}
#elif defined(__AVX2__)
inline Vec gather(const float* from, const int32_t* at) {
  return Vec{from[at[0]], from[at[1]], from[at[2]], from[at[3]],
             from[at[4]], from[at[5]], from[at[6]], from[at[7]]};
}
#else
inline Vec gather(const float* from, const int32_t* at) {
  return Vec{from[at[0]], from[at[1]], from[at[2]], from[at[3]]};
}
#endif

inline void scatter(Vec x, float* to, const int32_t* at) {
  for (int64_t i = 0; i < kWidth; ++i) to[at[i]] = x[i];
}

// The most common case, float32 at 32-bit positions that lie close together: a vector at a time,
// never in a buffer, so that reading goes on while roots and quotients are computed.
int64_t update_stream(const Arithmetic& arithmetic, const Run& run) {
  auto* const param = static_cast<float*>(run.param);
  const auto* const grad = static_cast<const float*>(run.grad);
  const auto* const at = static_cast<const int32_t*>(run.param_at.at);
  auto* const m = static_cast<float*>(run.exp_avg);
  auto* const v = static_cast<float*>(run.exp_avg_sq);
  auto* const v_max = static_cast<float*>(run.max_exp_avg_sq);
  int64_t i = 0;
  for (; i + kWidth <= run.count; i += kWidth) {
    Vec exp_avg = load(m + i), exp_avg_sq = load(v + i), largest = v_max ? load(v_max + i) : Vec{};
    const Vec p = arithmetic(gather(param, at + i), gather(grad, at + i), exp_avg, exp_avg_sq,
                             v_max ? &largest : nullptr);
    scatter(p, param, at + i);
    store(m + i, exp_avg);
    store(v + i, exp_avg_sq);
    if (v_max) store(v_max + i, largest);
  }
  return i;
}

}  // namespace

void update(const Run& run, const Step& step) {
  const Arithmetic arithmetic(step);
  const bool param_lies = run.param_dtype == Dtype::float32 && run.param_at.at == nullptr;
  const bool grad_lies = run.grad_dtype == Dtype::float32 && run.grad_at.at == nullptr;
  const bool together = run.param_at.at != nullptr && run.param_at.at == run.grad_at.at;
  const bool in_place = param_lies && run.master == nullptr;
  auto* const full = static_cast<float*>(in_place ? run.param : run.master);
  auto* const v_max = static_cast<float*>(run.max_exp_avg_sq);
  const bool wide = run.state_dtype == Dtype::float32;
  alignas(64) float p_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock];
  int64_t begin = 0;
  if (together && wide && !run.master && run.param_dtype == Dtype::float32 &&
      run.grad_dtype == Dtype::float32 && run.param_at.bytes == 4 && run.count >= kWidth &&
      is_stream(static_cast<const int32_t*>(run.param_at.at), run.count)) {
    begin = update_stream(arithmetic, run);
  }
  for (; begin < run.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, run.count - begin);
    float* const p = full ? full + begin : p_buffer;
    const float* const g = grad_lies ? static_cast<const float*>(run.grad) + begin : g_buffer;
    if (together) {
      read_both(p_buffer, g_buffer, run, begin, n);
    } else {
      if (!full) read(p_buffer, run.param, run.param_dtype, run.param_at, begin, n);
      if (!grad_lies) read(g_buffer, run.grad, run.grad_dtype, run.grad_at, begin, n);
    }
    float* const m = wide ? static_cast<float*>(run.exp_avg) + begin : m_buffer;
    float* const v = wide ? static_cast<float*>(run.exp_avg_sq) + begin : v_buffer;
    if (!wide) read_moments(run, begin, n, m, v);
    update_block(arithmetic, p, g, m, v, v_max ? v_max + begin : nullptr, n);
    if (!wide) write_moments(run, step.number, begin, n, m, v);
    if (!in_place) write(p, run.param, run.param_dtype, run.param_at, begin, n);
  }
}

}  // namespace fishkern::adamw::FISHKERN_ISA
