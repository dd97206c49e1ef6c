// What gated_activation and gated_glu share on the CPU: h = act(x), or act(x) * value for a gated
// linear unit, times a gate on each column, forward and backward, each in one pass.
//
// B batch, N tokens, F columns.
// Every column's gradient is summed over the tokens in order, with a new partial sum for every 32.
// So the bits depend on the sample alone: not on threads, batch, lane or instruction set.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/activations.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "layout.h"

namespace vitprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// some columns of all tokens of one sample; `value` is read of a gated linear unit alone, and
// `grad` in the backward alone, where `out` becomes the gradient w.r.t. x
template <typename In, typename Acc>
struct GatedSlab {
  const In* x;
  const In* value;
  const In* grad;
  const Acc* gate;
  In* out;
  In* grad_value;
  int64_t x_stride, value_stride, grad_stride, out_stride;  // from token to token
  int64_t num_tokens, width;
};

// a gate of 0 leaves 0 of everything, NaN and infinity too
template <typename V>
VP_INLINE V closed(V gate, V product) {
  const V zero{};
  return gate == zero ? zero : product;
}

// one vector of columns of one token
template <Activation kActivation, bool kGlu, bool kBackward, typename V, typename In, typename Acc>
VP_INLINE void gated_step(const In* x, const In* value, const In* grad, const Acc* gate, In* out,
                          In* grad_value, Acc* part) {
  const auto at = evaluate<kActivation>(load_lanes<V>(x));
  const V g = load_lanes<V>(gate);
  V v{};
  if constexpr (kGlu) v = load_lanes<V>(value);
  if constexpr (!kBackward) {
    store_lanes(out, closed(g, (kGlu ? at.value * v : at.value) * g));
  } else {
    const V incoming = load_lanes<V>(grad);
    const V through = incoming * g;
    store_lanes(out, closed(g, (kGlu ? through * v : through) * at.slope));
    if constexpr (kGlu) store_lanes(grad_value, closed(g, through * at.value));
    const V share = (kGlu ? incoming * v : incoming) * at.value;
    store_lanes(part, load_lanes<V>(part) + share);
  }
}

// in vectors of kBytes; `sums` has room for two rows of the width, rounded up to whole vectors
template <Activation kActivation, bool kGlu, bool kBackward, int kBytes, typename In, typename Acc>
VP_INLINE void gated_walk(const GatedSlab<In, Acc>& s, Acc* sums) {
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  const int64_t whole = s.width / lanes * lanes, rest = s.width - whole;
  const int64_t padded = whole + (rest ? lanes : 0);
  Acc* part = sums + padded;
  Acc last_gates[lanes] = {};
  std::memcpy(last_gates, s.gate + whole, rest * sizeof(Acc));
  std::fill_n(sums, padded, Acc(0));
  for (int64_t first = 0; first < s.num_tokens; first += kTokensPerPart) {
    std::fill_n(part, padded, Acc(0));
    const int64_t last = std::min(first + kTokensPerPart, s.num_tokens);
    for (int64_t n = first; n < last; ++n) {
      const In *x = s.x + n * s.x_stride, *value = s.value + n * s.value_stride;
      const In* grad = s.grad + n * s.grad_stride;
      In *out = s.out + n * s.out_stride, *grad_value = s.grad_value + n * s.out_stride;
      for (int64_t f = 0; f < whole; f += lanes) {
        gated_step<kActivation, kGlu, kBackward, V>(x + f, value + f, grad + f, s.gate + f, out + f,
                                                    grad_value + f, part + f);
      }
      if (rest) {
        // the same arithmetic for the last columns, on zeros beyond them
        In buffer[5][lanes] = {};
        std::memcpy(buffer[0], x + whole, rest * sizeof(In));
        if (kGlu) std::memcpy(buffer[1], value + whole, rest * sizeof(In));
        if (kBackward) std::memcpy(buffer[2], grad + whole, rest * sizeof(In));
        gated_step<kActivation, kGlu, kBackward, V>(buffer[0], buffer[1], buffer[2], last_gates,
                                                    buffer[3], buffer[4], part + whole);
        std::memcpy(out + whole, buffer[3], rest * sizeof(In));
        if (kGlu && kBackward) std::memcpy(grad_value + whole, buffer[4], rest * sizeof(In));
      }
    }
    for (int64_t f = 0; f < padded; ++f) sums[f] += part[f];
  }
}

template <typename In, typename Acc>
using GatedWalk = void (*)(const GatedSlab<In, Acc>&, Acc*);

template <Activation kActivation, bool kGlu, bool kBackward, typename In, typename Acc>
void gated_walk_baseline(const GatedSlab<In, Acc>& slab, Acc* sums) {
  gated_walk<kActivation, kGlu, kBackward, 16>(slab, sums);
}

#if VP_X86
template <Activation kActivation, bool kGlu, bool kBackward, typename In, typename Acc>
VP_TARGET(VP_AVX2)
void gated_walk_avx2(const GatedSlab<In, Acc>& slab, Acc* sums) {
  gated_walk<kActivation, kGlu, kBackward, 32>(slab, sums);
}

template <Activation kActivation, bool kGlu, bool kBackward, typename In, typename Acc>
VP_TARGET(VP_AVX512)
void gated_walk_avx512(const GatedSlab<In, Acc>& slab, Acc* sums) {
  gated_walk<kActivation, kGlu, kBackward, 64>(slab, sums);
}
#endif

template <bool kGlu, bool kBackward, typename In, typename Acc>
GatedWalk<In, Acc> choose_gated_walk(const char* op, const std::string& activation) {
  return with_activation(op, activation, [](auto constant) -> GatedWalk<In, Acc> {
    constexpr Activation kActivation = decltype(constant)::value;
#if VP_X86
    if (isa() >= Isa::kAvx512) return gated_walk_avx512<kActivation, kGlu, kBackward, In, Acc>;
    if (isa() >= Isa::kAvx2) return gated_walk_avx2<kActivation, kGlu, kBackward, In, Acc>;
#endif
    return gated_walk_baseline<kActivation, kGlu, kBackward, In, Acc>;
  });
}

// where results lie in the tensor that holds them
struct GatedPlaces {
  int64_t out, grad_value;  // the first element of each
  int64_t batch, token;     // from sample to sample and token to token
};

// the tensors of one call; those that it does not use are x once more
struct GatedCall {
  const char* op;
  const Tensor &x, &value, &grad;  // (B, N, F), columns adjacent
  const Tensor& gate;              // (F,), contiguous
  Tensor& out;
  GatedPlaces places;
  Tensor& grad_gate;  // (B, F), contiguous; out once more in the forward
  const std::string& activation;
};

template <bool kGlu, bool kBackward, typename In, typename Acc>
void run_gated(const GatedCall& call) {
  const auto walk = choose_gated_walk<kGlu, kBackward, In, Acc>(call.op, call.activation);
  const int64_t batch = call.x.size(0), num_tokens = call.x.size(1), columns = call.x.size(2);
  if (batch == 0 || columns == 0) return;
  GatedSlab<In, Acc> all;
  all.x = static_cast<const In*>(call.x.data_ptr());
  all.value = static_cast<const In*>(call.value.data_ptr());
  all.grad = static_cast<const In*>(call.grad.data_ptr());
  all.gate = static_cast<const Acc*>(call.gate.data_ptr());
  all.out = static_cast<In*>(call.out.data_ptr()) + call.places.out;
  all.grad_value = static_cast<In*>(call.out.data_ptr()) + call.places.grad_value;
  all.x_stride = call.x.stride(1);
  all.value_stride = call.value.stride(1);
  all.grad_stride = call.grad.stride(1);
  all.out_stride = call.places.token;
  all.num_tokens = num_tokens;
  Acc* grad_gates = kBackward ? static_cast<Acc*>(call.grad_gate.data_ptr()) : nullptr;
  const int64_t x_batch = call.x.stride(0), value_batch = call.value.stride(0);
  const int64_t grad_batch = call.grad.stride(0);
  const int64_t block = block_columns(batch, columns);
  const int64_t num_blocks = (columns + block - 1) / block;

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks, first = task % num_blocks * block;
      GatedSlab<In, Acc> slab = all;
      slab.x += b * x_batch + first;
      slab.value += b * value_batch + first;
      slab.grad += b * grad_batch + first;
      slab.gate += first;
      slab.out += b * call.places.batch + first;
      slab.grad_value += b * call.places.batch + first;
      slab.width = std::min(block, columns - first);
      walk(slab, sums.data());
      if (kBackward) std::copy_n(sums.data(), slab.width, grad_gates + b * columns + first);
    }
  });
}

template <bool kGlu, bool kBackward>
void dispatch_gated(const GatedCall& call, const char* x_name) {
  switch (call.x.scalar_type()) {
    case ScalarType::Float:
      return run_gated<kGlu, kBackward, float, float>(call);
    case ScalarType::Double:
      return run_gated<kGlu, kBackward, double, double>(call);
    case ScalarType::BFloat16:
      return run_gated<kGlu, kBackward, BFloat16, float>(call);
    case ScalarType::Half:
      return run_gated<kGlu, kBackward, Half, float>(call);
    default:
      VP_CHECK(false, call.op, x_name, "be float32, float64, bfloat16 or float16", "another dtype");
  }
}

inline void check_gated(const char* op, const char* x_name, const Tensor& x, const Tensor& gate) {
  VP_CHECK(x.dim() == 3, op, x_name, "have 3 dimensions", x.dim());
  VP_CHECK(gate.dim() == 1 && gate.size(0) == x.size(2), op, "gate_F", "have a number per column",
           "another shape");
  VP_CHECK(gate.size(0) <= 1 || gate.stride(0) == 1, op, "gate_F", "be contiguous", gate.stride(0));
  const bool wide = x.scalar_type() == ScalarType::Double;
  VP_CHECK(gate.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), op, "gate_F",
           "be float32, or float64 beside float64", "another dtype");
}

inline void check_gated_like(const char* op, const char* name, const Tensor& y, const Tensor& x) {
  VP_CHECK(y.dim() == 3 && std::equal(y.sizes().begin(), y.sizes().end(), x.sizes().begin()), op,
           name, "have the shape of the input", "another");
  VP_CHECK(y.scalar_type() == x.scalar_type(), op, name, "have the dtype of the input", "another");
}

}  // namespace vitprune
