// Which instruction set the kernels in csrc/cpu/simd run with: chosen once per process.
//
// The files in csrc/cpu/simd are compiled several times, each time with FISHKERN_ISA set to the
// name of the namespace that their code goes into (fishkern/backends/native/build.py). The
// environment variable FISHKERN_CPU_CAPABILITY (baseline, avx2, avx512) lowers the choice.
#pragma once

namespace fishkern {

enum class Capability { baseline, avx2, avx512 };

Capability capability();

}  // namespace fishkern

#if defined(__x86_64__)
// Declares the same functions in the namespace of every instruction set.
#define FISHKERN_DECLARE_FOR_EACH_ISA(...) \
  namespace baseline {                     \
  __VA_ARGS__                              \
  }                                        \
  namespace avx2 {                         \
  __VA_ARGS__                              \
  }                                        \
  namespace avx512 {                       \
  __VA_ARGS__                              \
  }
// The one of them that this machine runs, as a function pointer.
#define FISHKERN_FOR_THIS_CPU(function)                                           \
  (::fishkern::capability() == ::fishkern::Capability::avx512 ? &avx512::function \
   : ::fishkern::capability() == ::fishkern::Capability::avx2 ? &avx2::function   \
                                                              : &baseline::function)
#else
#define FISHKERN_DECLARE_FOR_EACH_ISA(...) \
  namespace baseline {                     \
  __VA_ARGS__                              \
  }
#define FISHKERN_FOR_THIS_CPU(function) (&baseline::function)
#endif
