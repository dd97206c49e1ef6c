// The activations of an MLP and their derivatives, in vectors.
//
// All but relu and sigmoid are x times a distribution function, so with a = |x|, the upper tail
// T(a) of the distribution and its density p = -T',
//     h(x)  = max(x, 0) - a T(a)
//     h'(x) = D below 0 and 1 - D above it, with D = T(a) - a p(a).
// Only T is ever computed: it loses no digits where the distribution rounds to 0 or 1, and its
// argument can be bounded, so that nothing overflows.
//
// Products and sums are fused where that is written (`fused`) and nowhere else, and divisions are
// exact, so the bits are the same for every instruction set.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "tensors.h"

namespace vitprune {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kQuickGelu, kSigmoid };

// function(std::integral_constant<Activation, ...>) for the activation of that name
template <typename Function>
auto with_activation(const char* op, const std::string& name, Function function) {
  if (name == "gelu") return function(std::integral_constant<Activation, Activation::kGelu>());
  if (name == "gelu_tanh") {
    return function(std::integral_constant<Activation, Activation::kGeluTanh>());
  }
  if (name == "relu") return function(std::integral_constant<Activation, Activation::kRelu>());
  if (name == "silu") return function(std::integral_constant<Activation, Activation::kSilu>());
  if (name == "quick_gelu") {
    return function(std::integral_constant<Activation, Activation::kQuickGelu>());
  }
  if (name == "sigmoid") {
    return function(std::integral_constant<Activation, Activation::kSigmoid>());
  }
  VP_CHECK(false, op, "activation", "name an activation", name);
}

// a * b + c with one rounding: one instruction where the target has it, else a call of the library
template <typename V>
VP_INLINE V fused(V a, V b, V c) {
  V out;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) {
    if constexpr (sizeof(a[0]) == 4) {
      out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    } else {
      out[lane] = __builtin_fma(a[lane], b[lane], c[lane]);
    }
  }
  return out;
}

// What differs between fp32 and fp64.
//   kExp2   2^f for |f| <= 1/2 as a polynomial in f, the highest power first. fp32: relative error
//           9.1e-8, minimax with 2^0 exact; fp64: 3e-18, through Chebyshev nodes.
//   kMills  T(a) / p(a) of the normal distribution as t times this polynomial in
//           t = 1 / (kMillsShift + a), which is smooth on the whole half line. fp32: error of T at
//           most 6.6e-9 and 3.1e-5 T, minimax with the smaller of the two as weight; fp64: 1e-16 T,
//           through Chebyshev nodes.
//   k...Bound  where exp(-...) is still a normal number, and T far below every rounding error
template <typename Acc>
struct Numbers;

template <>
struct Numbers<float> {
  static constexpr float kRound = 0x1.8p23f;
  static constexpr int kMantissa = 23;
  static constexpr double kExp2[] = {0.00132647273048, 0.00967151276973, 0.0555073374418,
                                     0.240222420834,   0.693146977598,   1.0};
  static constexpr double kMillsShift = 4;
  static constexpr double kMills[] = {-3745.666108, 3489.870638, -677.6427837, 178.6754255,
                                      4.194170206,  4.486643832, 0.9910910886};
  static constexpr double kNormalBound = 13, kLogisticBound = 87, kQuickBound = 51,
                          kTanhBound = 9.9;
};

template <>
struct Numbers<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissa = 52;
  static constexpr double kExp2[] = {
      4.45667546363986072e-10, 7.07419456261310477e-9, 1.01780511921178467e-7,
      1.32154325342541183e-6,  1.52527338562955734e-5, 1.54035304637279816e-4,
      1.33335581463903505e-3,  9.61812910758725343e-3, 5.5504108664821699e-2,
      2.40226506959101596e-1,  6.93147180559945308e-1, 1.0};
  static constexpr double kMillsShift = 5;
  static constexpr double kMills[] = {
      -5441906408912.43647, 13310400410109.4794, -14929115216588.342,  10147103684771.288,
      -4663841534741.97865, 1539136527178.66705, -380804108657.500739, 73271405752.0089093,
      -11213198792.5011557, 1369950390.72244873, -138072242.665230618, 11341122.7830755529,
      -570519.95964339081,  113793.556986183012, 23371.1653566652185,  7419.87923309877561,
      1948.37344809628261,  478.033797276099515, 109.999482865989507,  24.0000054763838046,
      4.99999996423920184,  1.00000000010823198};
  static constexpr double kNormalBound = 37, kLogisticBound = 708, kQuickBound = 415,
                          kTanhBound = 21;
};

// scale * (c[0] x^k + ... + c[k]); unrolled by recursion, as not every compiler unrolls a loop here
template <int kNext = 1, typename V, int kCount>
VP_INLINE V polynomial(const double (&c)[kCount], V x, double scale, V sum) {
  if constexpr (kNext == kCount) {
    return sum;
  } else {
    const V next = constant<V>(scale * c[kNext]);
    return polynomial<kNext + 1>(c, x, scale, fused(sum, x, next));
  }
}

template <typename V, int kCount>
VP_INLINE V polynomial(const double (&c)[kCount], V x, double scale = 1) {
  return polynomial(c, x, scale, constant<V>(scale * c[0]));
}

// scale 2^(rate x), for results that are normal numbers. NaN gives any number: the caller has to
// bring it in again.
template <typename V>
VP_INLINE V exp2_of(V x, double rate, double scale = 1) {
  using N = Numbers<Lane<V>>;
  const V round = constant<V>(N::kRound), c = constant<V>(rate);
  // the nearest integer is in the low bits of `shifted`, from where it moves into the exponent
  const V shifted = fused(x, c, round);
  const V fraction = fused(x, c, round - shifted);
  const V power = polynomial(N::kExp2, fraction, scale);
  return reinterpret_cast<V>(reinterpret_cast<Bits<V>>(power) +
                             (reinterpret_cast<Bits<V>>(shifted) << N::kMantissa));
}

// T(a) and p(a) = -T'(a) at a >= 0
template <typename V>
struct Tail {
  V value, density;
};

constexpr double kLog2E = 1.4426950408889634074;

// `magnitude` is `a` before it was bounded: without a bound t is as good, and keeps NaN
template <typename V>
VP_INLINE Tail<V> normal_tail(V a, V magnitude) {
  using N = Numbers<Lane<V>>;
  constexpr double kDensityAt0 = 0.39894228040143267794;
  const V density = exp2_of(a * a, -0.5 * kLog2E, kDensityAt0);
  const V t = constant<V>(1) / (constant<V>(N::kMillsShift) + magnitude);
  return {density * (t * polynomial(N::kMills, t)), density};
}

// 1 / (1 + exp(z)) and 1 / (1 + exp(-z)) with z = rate x
template <typename V>
struct Logistic {
  V lower, upper;
};

template <typename V>
VP_INLINE Logistic<V> logistic(V x, double rate) {
  const V one = constant<V>(1);
  const V e = exp2_of(x, -rate * kLog2E);
  const V upper = one / (one + e);
  return {e * upper, upper};
}

template <Activation kActivation, typename V>
VP_INLINE Tail<V> tail_of(V a, V magnitude) {
  if constexpr (kActivation == Activation::kGelu) {
    return normal_tail(a, magnitude);
  } else if constexpr (kActivation == Activation::kSilu) {
    const Logistic<V> s = logistic(a, 1);
    return {s.lower, s.lower * s.upper};
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    const Logistic<V> s = logistic(a, 1.702);
    return {s.lower, s.lower * s.upper * constant<V>(1.702)};
  } else {
    // (1 + tanh(z / 2)) / 2 is the logistic function of z = sqrt(8 / pi) (a + 0.044715 a^3)
    constexpr double kRate = 1.59576912160573071176, kCube = 0.044715;
    const V square = a * a;
    const Logistic<V> s = logistic(a * fused(square, constant<V>(kCube), constant<V>(1)), kRate);
    const V slope = fused(square, constant<V>(3 * kRate * kCube), constant<V>(kRate));
    return {s.lower, s.lower * s.upper * slope};
  }
}

template <Activation kActivation, typename Acc>
constexpr double bound_of() {
  using N = Numbers<Acc>;
  switch (kActivation) {
    case Activation::kGelu:
      return N::kNormalBound;
    case Activation::kGeluTanh:
      return N::kTanhBound;
    case Activation::kQuickGelu:
      return N::kQuickBound;
    default:
      return N::kLogisticBound;
  }
}

template <Activation kActivation, typename V>
VP_INLINE V bounded(V magnitude) {
  const V bound = constant<V>(bound_of<kActivation, Lane<V>>());
  if constexpr (kActivation == Activation::kGelu) {
    // numbers >= 0 are ordered as their bits are, and integers have a unit to spare here; NaN gives
    // the bound
    const auto bits = reinterpret_cast<Bits<V>>(magnitude), most = reinterpret_cast<Bits<V>>(bound);
    return reinterpret_cast<V>(bits > most ? most : bits);
  } else {
    // NaN passes
    return magnitude > bound ? bound : magnitude;
  }
}

// h(x) and h'(x)
template <typename V>
struct ValueAndSlope {
  V value, slope;
};

template <Activation kActivation, typename V>
VP_INLINE ValueAndSlope<V> evaluate(V x) {
  const V zero{}, one = constant<V>(1);
  // comparisons are written so that NaN passes
  const auto below = x <= zero;
  const V positive = below ? zero : x;
  if constexpr (kActivation == Activation::kRelu) {
    return {positive, below ? zero : one};
  }
  const V magnitude = absolute(x);
  const V a = bounded<kActivation>(magnitude);
  if constexpr (kActivation == Activation::kSigmoid) {
    const Logistic<V> s = logistic(a, 1);
    const V zero_or_nan = a - a;
    return {(below ? s.lower : s.upper) + zero_or_nan, s.lower * s.upper + zero_or_nan};
  } else {
    const Tail<V> tail = tail_of<kActivation>(a, magnitude);
    const V slope = fused(-a, tail.density, tail.value);
    return {fused(-a, tail.value, positive), below ? slope : one - slope};
  }
}

}  // namespace vitprune
