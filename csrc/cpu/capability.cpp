#include "cpu/capability.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdlib>
#include <string>

namespace fishkern {
namespace {

Capability supported() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Capability::avx512 : Capability::avx2;
#endif
  return Capability::baseline;
}

Capability choose() {
  const char* cap = std::getenv("FISHKERN_CPU_CAPABILITY");
  if (cap == nullptr || *cap == '\0') return supported();
  const std::string name = cap;
  STD_TORCH_CHECK(name == "baseline" || name == "avx2" || name == "avx512",
                  "FISHKERN_CPU_CAPABILITY is '", name, "': set baseline, avx2 or avx512");
  const Capability asked = name == "avx512" ? Capability::avx512
                           : name == "avx2" ? Capability::avx2
                                            : Capability::baseline;
  return asked < supported() ? asked : supported();
}

// For the environment report: 0 baseline, 1 avx2, 2 avx512.
int64_t cpu_capability() { return static_cast<int64_t>(capability()); }

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace fishkern

STABLE_TORCH_LIBRARY_FRAGMENT(fishkern_native, m) { m.def("cpu_capability() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fishkern_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fishkern::cpu_capability));
}
