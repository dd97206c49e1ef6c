// activation_score on the CPU: grad_x = grad * act'(x) and score[b, f] = sum over tokens of
// act(x) * grad, or with per_token of |act(x) * grad|, in one pass.
//
// B batch, N tokens, F columns.
// Every column is summed over the tokens in order, with a new partial sum for every 32. So the bits
// depend on the B-th sample alone: not on threads, batch, lane or instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
  const In* x;
  const In* grad;
  In* grad_x;
  int64_t x_stride, grad_stride, grad_x_stride;  // from token to token
  int64_t num_tokens, width;
  bool per_token;
};

// one vector of columns of one token
template <Activation kActivation, typename V, typename In, typename Acc>
VP_INLINE void step(const In* x, const In* grad, In* grad_x, bool per_token, Acc* part) {
  const auto at = evaluate<kActivation>(load_lanes<V>(x));
  const V g = load_lanes<V>(grad);
  store_lanes(grad_x, g * at.slope);
  const V share = at.value * g;
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
      const In *x = s.x + n * s.x_stride, *grad = s.grad + n * s.grad_stride;
      In* grad_x = s.grad_x + n * s.grad_x_stride;
      for (int64_t f = 0; f < whole; f += lanes) {
        step<kActivation, V>(x + f, grad + f, grad_x + f, s.per_token, part + f);
      }
      if (rest) {
        // the same arithmetic for the last columns, on zeros beyond them
        In buffer[3][lanes] = {};
        std::memcpy(buffer[0], x + whole, rest * sizeof(In));
        std::memcpy(buffer[1], grad + whole, rest * sizeof(In));
        step<kActivation, V>(buffer[0], buffer[1], buffer[2], s.per_token, part + whole);
        std::memcpy(grad_x + whole, buffer[2], rest * sizeof(In));
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
  return with_activation("activation_score", activation, [](auto constant) -> Walk<In, Acc> {
    constexpr Activation kActivation = decltype(constant)::value;
#if VP_X86
    if (isa() >= Isa::kAvx512) return walk_avx512<kActivation, In, Acc>;
    if (isa() >= Isa::kAvx2) return walk_avx2<kActivation, In, Acc>;
#endif
    return walk_baseline<kActivation, In, Acc>;
  });
}

template <typename In, typename Acc>
void run(const Tensor& x,     // (B, N, F)
         const Tensor& grad,  // (B, N, F)
         Tensor& grad_x,      // (B, N, F), contiguous
         Tensor& score,       // (B, F), contiguous
         const std::string& activation, bool per_token) {
  const auto walk = choose_walk<In, Acc>(activation);
  const int64_t batch = x.size(0), num_tokens = x.size(1), columns = x.size(2);
  if (batch == 0 || columns == 0) return;
  Slab<In> whole;
  whole.x = static_cast<const In*>(x.data_ptr());
  whole.grad = static_cast<const In*>(grad.data_ptr());
  whole.grad_x = static_cast<In*>(grad_x.data_ptr());
  whole.x_stride = x.stride(1);
  whole.grad_stride = grad.stride(1);
  whole.grad_x_stride = columns;
  whole.num_tokens = num_tokens;
  whole.per_token = per_token;
  Acc* scores = static_cast<Acc*>(score.data_ptr());
  const int64_t x_batch = x.stride(0), grad_batch = grad.stride(0);
  const int64_t block = block_columns(batch, columns);
  const int64_t num_blocks = (columns + block - 1) / block;

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks, first = task % num_blocks * block;
      Slab<In> slab = whole;
      slab.x += b * x_batch + first;
      slab.grad += b * grad_batch + first;
      slab.grad_x += b * num_tokens * columns + first;
      slab.width = std::min(block, columns - first);
      walk(slab, sums.data());
      std::copy_n(sums.data(), slab.width, scores + b * columns + first);
    }
  });
}

std::tuple<Tensor, Tensor> activation_score(Tensor x, Tensor grad, std::string activation,
                                            bool per_token) {
  VP_CHECK(x.dim() == 3, "activation_score", "x_BNF", "have 3 dimensions", x.dim());
  VP_CHECK(grad.dim() == 3 && std::equal(x.sizes().begin(), x.sizes().end(), grad.sizes().begin()),
           "activation_score", "grad_BNF", "have the shape of x_BNF", "another");
  VP_CHECK(grad.scalar_type() == x.scalar_type(), "activation_score", "grad_BNF",
           "have the dtype of x_BNF", "another");
  x = with_adjacent_columns(x);
  grad = with_adjacent_columns(grad);
  const int64_t batch = x.size(0), num_tokens = x.size(1), columns = x.size(2);
  const ScalarType type = x.scalar_type();
  const ScalarType score_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_x = torch::stable::new_empty(x, {batch, num_tokens, columns}, type);
  Tensor score = torch::stable::new_empty(x, {batch, columns}, score_type);
  switch (type) {
    case ScalarType::Float:
      run<float, float>(x, grad, grad_x, score, activation, per_token);
      break;
    case ScalarType::Double:
      run<double, double>(x, grad, grad_x, score, activation, per_token);
      break;
    case ScalarType::BFloat16:
      run<BFloat16, float>(x, grad, grad_x, score, activation, per_token);
      break;
    case ScalarType::Half:
      run<Half, float>(x, grad, grad_x, score, activation, per_token);
      break;
    default:
      VP_CHECK(false, "activation_score", "x_BNF", "be float32, float64, bfloat16 or float16",
               "another dtype");
  }
  return {grad_x, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("activation_score", TORCH_BOX(&activation_score));
}
