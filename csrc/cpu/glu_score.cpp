// glu_score on the CPU: of h = act(gate) * value the gradients w.r.t. gate and value, and
// score[b, f] = sum over tokens of h * grad, or with per_token of |h * grad|, in one pass.
//
// B batch, N tokens, F columns. Gate and value may be the halves of one tensor, and so may their
// gradients.
// Every column is summed over the tokens in order, with a new partial sum for every 32. So the bits
// depend on the B-th sample alone: not on threads, batch, lane or instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/activations.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace vitprune;

// some columns of all tokens of one sample
template <typename In>
struct Slab {
  const In* gate;
  const In* value;
  const In* grad;
  In* grad_gate;
  In* grad_value;
  int64_t gate_stride, value_stride, grad_stride, out_stride;  // from token to token
  int64_t num_tokens, width;
  bool per_token;
};

// one vector of columns of one token
template <Activation kActivation, typename V, typename In, typename Acc>
VP_INLINE void step(const In* gate, const In* value, const In* grad, In* grad_gate, In* grad_value,
                    bool per_token, Acc* part) {
  const auto at = evaluate<kActivation>(load_lanes<V>(gate));
  const V v = load_lanes<V>(value), g = load_lanes<V>(grad);
  const V through_value = g * v;
  store_lanes(grad_gate, through_value * at.slope);
  store_lanes(grad_value, g * at.value);
  const V share = through_value * at.value;
  store_lanes(part, load_lanes<V>(part) + (per_token ? absolute(share) : share));
}

// in vectors of kBytes; `sums` has room for two rows of the width, rounded up to whole vectors
template <Activation kActivation, int kBytes, typename In, typename Acc>
VP_INLINE void walk(const Slab<In>& s, Acc* sums) {
  using V = Vector<Acc, kBytes>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  const int64_t whole = s.width / lanes * lanes, rest = s.width - whole;
  const int64_t padded = whole + (rest ? lanes : 0);
  Acc* part = sums + padded;
  std::fill_n(sums, padded, Acc(0));
  for (int64_t first = 0; first < s.num_tokens; first += kTokensPerPart) {
    std::fill_n(part, padded, Acc(0));
    const int64_t last = std::min(first + kTokensPerPart, s.num_tokens);
    for (int64_t n = first; n < last; ++n) {
      const In *gate = s.gate + n * s.gate_stride, *value = s.value + n * s.value_stride;
      const In* grad = s.grad + n * s.grad_stride;
      In *grad_gate = s.grad_gate + n * s.out_stride, *grad_value = s.grad_value + n * s.out_stride;
      for (int64_t f = 0; f < whole; f += lanes) {
        step<kActivation, V>(gate + f, value + f, grad + f, grad_gate + f, grad_value + f,
                             s.per_token, part + f);
      }
      if (rest) {
        // the same arithmetic for the last columns, on zeros beyond them
        In buffer[5][lanes] = {};
        std::memcpy(buffer[0], gate + whole, rest * sizeof(In));
        std::memcpy(buffer[1], value + whole, rest * sizeof(In));
        std::memcpy(buffer[2], grad + whole, rest * sizeof(In));
        step<kActivation, V>(buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], s.per_token,
                             part + whole);
        std::memcpy(grad_gate + whole, buffer[3], rest * sizeof(In));
        std::memcpy(grad_value + whole, buffer[4], rest * sizeof(In));
      }
    }
    for (int64_t f = 0; f < padded; ++f) sums[f] += part[f];
  }
}

template <typename In, typename Acc>
using Walk = void (*)(const Slab<In>&, Acc*);

template <Activation kActivation, typename In, typename Acc>
void walk_baseline(const Slab<In>& slab, Acc* sums) {
  walk<kActivation, 16>(slab, sums);
}

#if VP_X86
template <Activation kActivation, typename In, typename Acc>
VP_TARGET(VP_AVX2)
void walk_avx2(const Slab<In>& slab, Acc* sums) {
  walk<kActivation, 32>(slab, sums);
}

template <Activation kActivation, typename In, typename Acc>
VP_TARGET(VP_AVX512)
void walk_avx512(const Slab<In>& slab, Acc* sums) {
  walk<kActivation, 64>(slab, sums);
}
#endif

template <typename In, typename Acc>
Walk<In, Acc> choose_walk(const std::string& activation) {
  return with_activation("glu_score", activation, [](auto constant) -> Walk<In, Acc> {
    constexpr Activation kActivation = decltype(constant)::value;
#if VP_X86
    if (isa() >= Isa::kAvx512) return walk_avx512<kActivation, In, Acc>;
    if (isa() >= Isa::kAvx2) return walk_avx2<kActivation, In, Acc>;
#endif
    return walk_baseline<kActivation, In, Acc>;
  });
}

// where the two gradients lie in the tensor that holds both
struct Places {
  int64_t gate, value;   // the first element of each
  int64_t batch, token;  // from sample to sample and token to token
};

template <typename In, typename Acc>
void run(const Tensor& gate,   // (B, N, F)
         const Tensor& value,  // (B, N, F)
         const Tensor& grad,   // (B, N, F)
         Tensor& gradients, const Places& places,
         Tensor& score,  // (B, F), contiguous
         const std::string& activation, bool per_token) {
  const auto walk = choose_walk<In, Acc>(activation);
  const int64_t batch = gate.size(0), num_tokens = gate.size(1), columns = gate.size(2);
  if (batch == 0 || columns == 0) return;
  Slab<In> whole;
  whole.gate = static_cast<const In*>(gate.data_ptr());
  whole.value = static_cast<const In*>(value.data_ptr());
  whole.grad = static_cast<const In*>(grad.data_ptr());
  whole.grad_gate = static_cast<In*>(gradients.data_ptr()) + places.gate;
  whole.grad_value = static_cast<In*>(gradients.data_ptr()) + places.value;
  whole.gate_stride = gate.stride(1);
  whole.value_stride = value.stride(1);
  whole.grad_stride = grad.stride(1);
  whole.out_stride = places.token;
  whole.num_tokens = num_tokens;
  whole.per_token = per_token;
  Acc* scores = static_cast<Acc*>(score.data_ptr());
  const int64_t gate_batch = gate.stride(0), value_batch = value.stride(0);
  const int64_t grad_batch = grad.stride(0);
  const int64_t block = block_columns(batch, columns);
  const int64_t num_blocks = (columns + block - 1) / block;

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks, first = task % num_blocks * block;
      Slab<In> slab = whole;
      slab.gate += b * gate_batch + first;
      slab.value += b * value_batch + first;
      slab.grad += b * grad_batch + first;
      slab.grad_gate += b * places.batch + first;
      slab.grad_value += b * places.batch + first;
      slab.width = std::min(block, columns - first);
      walk(slab, sums.data());
      std::copy_n(sums.data(), slab.width, scores + b * columns + first);
    }
  });
}

void check_like(const char* name, const Tensor& x, const Tensor& gate) {
  VP_CHECK(x.dim() == 3 && std::equal(x.sizes().begin(), x.sizes().end(), gate.sizes().begin()),
           "glu_score", name, "have the shape of gate_BNF", "another");
  VP_CHECK(x.scalar_type() == gate.scalar_type(), "glu_score", name, "have the dtype of gate_BNF",
           "another");
}

std::tuple<Tensor, Tensor> glu_score(Tensor gate, Tensor value, Tensor grad, std::string activation,
                                     std::optional<std::string> packed, bool per_token) {
  VP_CHECK(gate.dim() == 3, "glu_score", "gate_BNF", "have 3 dimensions", gate.dim());
  check_like("value_BNF", value, gate);
  check_like("grad_BNF", grad, gate);
  VP_CHECK(!packed || *packed == "gate_first" || *packed == "gate_last", "glu_score", "packed",
           "be gate_first, gate_last or None", *packed);
  gate = with_adjacent_columns(gate);
  value = with_adjacent_columns(value);
  grad = with_adjacent_columns(grad);
  const int64_t batch = gate.size(0), num_tokens = gate.size(1), columns = gate.size(2);
  const ScalarType type = gate.scalar_type();
  const ScalarType score_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor score = torch::stable::new_empty(gate, {batch, columns}, score_type);
  Tensor gradients = packed ? torch::stable::new_empty(gate, {batch, num_tokens, 2 * columns}, type)
                            : torch::stable::new_empty(gate, {2, batch, num_tokens, columns}, type);
  Places places = {0, batch * num_tokens * columns, num_tokens * columns, columns};
  if (packed) {
    const bool gate_last = *packed == "gate_last";
    places = {gate_last ? columns : 0, gate_last ? 0 : columns, 2 * num_tokens * columns,
              2 * columns};
  }
  switch (type) {
    case ScalarType::Float:
      run<float, float>(gate, value, grad, gradients, places, score, activation, per_token);
      break;
    case ScalarType::Double:
      run<double, double>(gate, value, grad, gradients, places, score, activation, per_token);
      break;
    case ScalarType::BFloat16:
      run<BFloat16, float>(gate, value, grad, gradients, places, score, activation, per_token);
      break;
    case ScalarType::Half:
      run<Half, float>(gate, value, grad, gradients, places, score, activation, per_token);
      break;
    default:
      VP_CHECK(false, "glu_score", "gate_BNF", "be float32, float64, bfloat16 or float16",
               "another dtype");
  }
  return {gradients, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("glu_score", TORCH_BOX(&glu_score));
}
