// Vectors, and how numbers of every dtype get into and out of them.
//
// A vector of 64 bytes is split by the compiler into whatever registers the target has. Where code
// compares and selects, that split is poor: there a vector as wide as the registers is taken. What
// is computed in each lane is the same for every width and instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "tensors.h"

namespace vitprune {

typedef float F32x4 __attribute__((vector_size(16)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef float F32x16 __attribute__((vector_size(64)));
typedef double F64x2 __attribute__((vector_size(16)));
typedef double F64x4 __attribute__((vector_size(32)));
typedef double F64x8 __attribute__((vector_size(64)));
typedef uint16_t U16x4 __attribute__((vector_size(8)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint64_t U64x2 __attribute__((vector_size(16)));
typedef uint64_t U64x4 __attribute__((vector_size(32)));
typedef uint64_t U64x8 __attribute__((vector_size(64)));

// a partial sum over tokens stays short, so the rounding error grows with N / 32 and not with N
constexpr int64_t kTokensPerPart = 32;

// numbers of one vector of what is accumulated in
template <typename Acc>
constexpr int64_t kLanes = 64 / sizeof(Acc);

template <typename V>
using Lane = std::remove_cv_t<std::remove_reference_t<decltype(V()[0])>>;

// the types of the bits of V, and of as many 16-bit numbers as V has lanes
template <typename V>
struct BitsOf;
template <typename Acc, int kBytes>
struct VectorOf;

#define VP_VECTOR(Acc, bytes, V, Unsigned, Half) \
  template <>                                    \
  struct BitsOf<V> {                             \
    using Type = Unsigned;                       \
    using Short = Half;                          \
  };                                             \
  template <>                                    \
  struct VectorOf<Acc, bytes> {                  \
    using Type = V;                              \
  };
VP_VECTOR(float, 16, F32x4, U32x4, U16x4)
VP_VECTOR(float, 32, F32x8, U32x8, U16x8)
VP_VECTOR(float, 64, F32x16, U32x16, U16x16)
VP_VECTOR(double, 16, F64x2, U64x2, void)
VP_VECTOR(double, 32, F64x4, U64x4, void)
VP_VECTOR(double, 64, F64x8, U64x8, void)
#undef VP_VECTOR

template <typename Acc, int kBytes>
using Vector = typename VectorOf<Acc, kBytes>::Type;
template <typename V>
using Bits = typename BitsOf<V>::Type;

// the same number in every lane
template <typename V>
VP_INLINE V constant(double value) {
  return static_cast<Lane<V>>(value) - V{};
}

template <typename V = F32x16>
VP_INLINE V load_lanes(const float* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename V = F64x8>
VP_INLINE V load_lanes(const double* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename V>
VP_INLINE Bits<V> load_bits(const void* x) {
  typename BitsOf<V>::Short bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, Bits<V>);
}

template <typename V = F32x16>
VP_INLINE V load_lanes(const BFloat16* x) {
  return reinterpret_cast<V>(load_bits<V>(x) << 16);
}

template <typename V = F32x16>
VP_INLINE V load_lanes(const Half* x) {
  using U = Bits<V>;
  const U bits = load_bits<V>(x);
  const U magnitude = bits & 0x7fffu;
  // normal numbers, infinity and NaN: move the exponent from bias 15 to bias 127
  const U wide = (magnitude << 13) + ((127u - 15u) << 23);
  const U special = wide + ((127u - 15u) << 23);
  // subnormal numbers: an integer count of 2^-24, exact in fp32 and never subnormal there
  const U tiny =
      reinterpret_cast<U>(reinterpret_cast<V>(magnitude + (126u << 23)) - constant<V>(0.5));
  const U value = magnitude < 0x0400u ? tiny : (magnitude >= 0x7c00u ? special : wide);
  return reinterpret_cast<V>(value | ((bits & 0x8000u) << 16));
}

template <typename V>
VP_INLINE void store_lanes(float* x, V v) {
  std::memcpy(x, &v, sizeof v);
}

template <typename V>
VP_INLINE void store_lanes(double* x, V v) {
  std::memcpy(x, &v, sizeof v);
}

template <typename V>
VP_INLINE void store_bits(void* x, Bits<V> bits) {
  const auto low = __builtin_convertvector(bits, typename BitsOf<V>::Short);
  std::memcpy(x, &low, sizeof low);
}

// to the nearest, ties to even, as torch rounds; NaN becomes the one quiet NaN
template <typename V>
VP_INLINE void store_lanes(BFloat16* x, V v) {
  using U = Bits<V>;
  const U bits = reinterpret_cast<U>(v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U magnitude = bits & 0x7fffffffu;
  store_bits<V>(x, magnitude > 0x7f800000u ? rounded * 0u + 0x7fc0u : rounded);
}

// to the nearest, ties to even
template <typename V>
VP_INLINE void store_lanes(Half* x, V v) {
  using U = Bits<V>;
  const U bits = reinterpret_cast<U>(v);
  const U magnitude = bits & 0x7fffffffu;
  // normal numbers: move the exponent from bias 127 to bias 15; a carry may reach infinity
  const U normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // subnormal numbers: 0.5 + x has the spacing 2^-24 of fp16 there, so the sum rounds as it must
  const V half = constant<V>(0.5);
  const U tiny =
      reinterpret_cast<U>(reinterpret_cast<V>(magnitude) + half) - reinterpret_cast<U>(half);
  const U zero = bits * 0u;
  const U special = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  const U value = magnitude >= ((127u + 16u) << 23)
                      ? special
                      : (magnitude < ((127u - 14u) << 23) ? tiny : normal);
  store_bits<V>(x, value | ((bits >> 16) & 0x8000u));
}

// the first `count` numbers, then zeros
template <typename In>
VP_INLINE auto load_first(const In* x, int64_t count) {
  constexpr int64_t lanes = sizeof(load_lanes(x)) / sizeof(load_lanes(x)[0]);
  if (count >= lanes) return load_lanes(x);
  In padded[lanes];
  std::memset(padded, 0, sizeof padded);
  std::memcpy(padded, x, count * sizeof(In));
  return load_lanes(padded);
}

template <typename In, typename V>
VP_INLINE void store_first(In* x, V v, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(v[0]);
  if (count >= lanes) return store_lanes(x, v);
  In padded[lanes];
  store_lanes(padded, v);
  std::memcpy(x, padded, count * sizeof(In));
}

template <typename V>
VP_INLINE V absolute(V v) {
  return reinterpret_cast<V>(reinterpret_cast<Bits<V>>(v) & (~Lane<Bits<V>>(0) >> 1));
}

// the lanes added as one fixed tree: the upper half of a vector onto its lower half, and again
template <typename Half, typename V>
VP_INLINE Half fold(V v) {
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return low + high;
}

VP_INLINE float sum_lanes(F32x16 v) {
  const F32x4 sum = fold<F32x4>(fold<F32x8>(v));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

VP_INLINE double sum_lanes(F64x8 v) {
  const F64x2 sum = fold<F64x2>(fold<F64x4>(v));
  return sum[0] + sum[1];
}

}  // namespace vitprune
