// Which vector instructions this process may use, decided once at run time; and code that is
// compiled for each of them.
#pragma once
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define VP_X86 1
#define VP_TARGET(features) __attribute__((target(features)))
#else
#define VP_X86 0
#endif
#define VP_AVX2 "avx2,fma,popcnt"
#define VP_AVX512 "avx512f,avx512bw,avx512vl,avx512dq," VP_AVX2
#define VP_AVX512_VBMI2 "avx512vbmi2," VP_AVX512

// after the parameters of a lambda, which would otherwise be compiled for the baseline
#define VP_ALWAYS_INLINE __attribute__((always_inline))
#define VP_INLINE inline VP_ALWAYS_INLINE

namespace vitprune {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Vbmi2 };

inline const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512+vbmi2"};
  return names[static_cast<int>(isa)];
}

inline Isa detect_isa() {
#if VP_X86
  // ATen's own switch lowers ours too: ATEN_CPU_CAPABILITY=default|avx2|avx512
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool at_most_baseline = wanted && std::strcmp(wanted, "default") == 0;
  const bool at_most_avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("popcnt");
  if (at_most_baseline || !avx2) return Isa::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (at_most_avx2 || !avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512vbmi2") ? Isa::kAvx512Vbmi2 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

template <typename Step, typename... Args>
void run_baseline(Args... args) {
  Step::template run<16>(args...);
}

#if VP_X86
template <typename Step, typename... Args>
VP_TARGET(VP_AVX2)
void run_avx2(Args... args) {
  Step::template run<32>(args...);
}

template <typename Step, typename... Args>
VP_TARGET(VP_AVX512)
void run_avx512(Args... args) {
  Step::template run<64>(args...);
}
#endif

// Step::run<bytes of a vector>(...), compiled for the instructions of this processor
template <typename Step, typename... Args>
void run(Args... args) {
#if VP_X86
  if (isa() >= Isa::kAvx512) return run_avx512<Step>(args...);
  if (isa() >= Isa::kAvx2) return run_avx2<Step>(args...);
#endif
  run_baseline<Step>(args...);
}

}  // namespace vitprune
