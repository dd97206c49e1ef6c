// gated_unit on the CPU: out = h * gate with h = act(x), or act(x) * value for a gated linear unit;
// and its backward, with the sum of h * grad over tokens, or with per_token of |h * grad|. One pass
// each. Packed, x and value are the halves of one tensor, and so are their gradients.
//
// B batch, N tokens, F columns.
// Every column is summed over the tokens in order, with a new partial sum for every 32. So the bits
// depend on the sample alone: not on threads, batch, lane or instruction set.
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

#include "cpu/activations.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "tensors.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "gated_unit";
// columns whose sums stay in the first-level cache while the tokens stream by
constexpr int64_t kMostColumns = 4096;
constexpr int64_t kLeastColumns = 256;

// Columns of one task. Whole rows where the samples keep all threads busy: memory is read fastest
// without gaps. The bits are the same for every choice, as each column has its own sum.
int64_t block_columns(int64_t batch, int64_t columns) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks_per_sample = (threads + batch - 1) / batch;
  const int64_t share = (columns + tasks_per_sample - 1) / tasks_per_sample;
  const int64_t whole_lines = (share + 63) / 64 * 64;
  return std::clamp(whole_lines, kLeastColumns, kMostColumns);
}

// forward with a gate, backward with a gate, backward without one
enum class Pass { kForward, kBackward, kScore };

// some columns of all tokens of one sample; only what the pass reads or writes is there
template <typename In, typename Acc>
struct Slab {
  const In* x;
  const In* value;
  const In* grad;
  const Acc* gate;
  In* out;  // in a backward the gradient w.r.t. x
  In* grad_value;
  int64_t x_stride, value_stride, grad_stride, out_stride;  // from token to token
  int64_t num_tokens, width;
  bool per_token;
};

// a gate of 0 leaves 0 of everything, NaN and infinity too
template <typename V>
VP_INLINE V closed(V gate, V product) {
  const V zero{};
  return gate == zero ? zero : product;
}

// one vector of columns of one token
template <Activation kActivation, bool kGlu, Pass kPass, typename V, typename In, typename Acc>
VP_INLINE void step(const In* x, const In* value, const In* grad, const Acc* gate, In* out,
                    In* grad_value, bool per_token, Acc* part) {
  const auto at = evaluate<kActivation>(load_lanes<V>(x));
  V v{}, g{};
  if constexpr (kGlu) v = load_lanes<V>(value);
  if constexpr (kPass != Pass::kScore) g = load_lanes<V>(gate);
  if constexpr (kPass == Pass::kForward) {
    store_lanes(out, closed(g, (kGlu ? at.value * v : at.value) * g));
    return;
  }
  const V incoming = load_lanes<V>(grad);
  if constexpr (kPass == Pass::kBackward) {
    const V through = incoming * g;
    store_lanes(out, closed(g, (kGlu ? through * v : through) * at.slope));
    if constexpr (kGlu) store_lanes(grad_value, closed(g, through * at.value));
  } else {
    store_lanes(out, (kGlu ? incoming * v : incoming) * at.slope);
    if constexpr (kGlu) store_lanes(grad_value, incoming * at.value);
  }
  const V share = (kGlu ? incoming * v : incoming) * at.value;
  store_lanes(part, load_lanes<V>(part) + (per_token ? absolute(share) : share));
}

// `sums` has room for two rows of the width, rounded up to whole vectors
template <Activation kActivation, bool kGlu, Pass kPass, typename In, typename Acc>
struct Walk {
  template <int kBytes>
  static VP_INLINE void run(Slab<In, Acc> s, Acc* sums) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    const bool per_token = kPass == Pass::kScore && s.per_token;
    const int64_t whole = s.width / lanes * lanes, rest = s.width - whole;
    const int64_t padded = whole + (rest ? lanes : 0);
    Acc* part = sums + padded;
    Acc last_gates[lanes] = {};
    if (kPass != Pass::kScore) std::memcpy(last_gates, s.gate + whole, rest * sizeof(Acc));
    std::fill_n(sums, padded, Acc(0));
    for (int64_t first = 0; first < s.num_tokens; first += kTokensPerPart) {
      std::fill_n(part, padded, Acc(0));
      const int64_t last = std::min(first + kTokensPerPart, s.num_tokens);
      for (int64_t n = first; n < last; ++n) {
        const In *x = s.x + n * s.x_stride, *value = s.value + n * s.value_stride;
        const In* grad = s.grad + n * s.grad_stride;
        In *out = s.out + n * s.out_stride, *grad_value = s.grad_value + n * s.out_stride;
        for (int64_t f = 0; f < whole; f += lanes) {
          step<kActivation, kGlu, kPass, V>(x + f, value + f, grad + f, s.gate + f, out + f,
                                            grad_value + f, per_token, part + f);
        }
        if (rest) {
          // the same arithmetic for the last columns, on zeros beyond them
          In buffer[5][lanes] = {};
          std::memcpy(buffer[0], x + whole, rest * sizeof(In));
          if (kGlu) std::memcpy(buffer[1], value + whole, rest * sizeof(In));
          if (kPass != Pass::kForward) std::memcpy(buffer[2], grad + whole, rest * sizeof(In));
          step<kActivation, kGlu, kPass, V>(buffer[0], buffer[1], buffer[2], last_gates, buffer[3],
                                            buffer[4], per_token, part + whole);
          std::memcpy(out + whole, buffer[3], rest * sizeof(In));
          if (kGlu && kPass != Pass::kForward) {
            std::memcpy(grad_value + whole, buffer[4], rest * sizeof(In));
          }
        }
      }
      for (int64_t f = 0; f < padded; ++f) sums[f] += part[f];
    }
  }
};

// the tensors of one call; what its pass does not touch is x once more
struct Call {
  Tensor x, value, grad;  // columns adjacent
  Tensor gate;            // (F,), contiguous
  Tensor out;             // contiguous: the result, or all gradients
  Tensor score;           // (B, F), contiguous
  const std::string& activation;
  bool per_token;
  int64_t batch, num_tokens, columns;
  int64_t x_at = 0, value_at = 0;         // the first element of each in its tensor
  int64_t out_at = 0, grad_value_at = 0;  // the same in `out`
  int64_t out_batch, out_token;           // in `out` from sample to sample and token to token
};

template <Activation kActivation, bool kGlu, Pass kPass, typename In, typename Acc>
void compute(const Call& call) {
  const int64_t batch = call.batch, columns = call.columns;
  if (batch == 0 || columns == 0) return;
  Slab<In, Acc> all;
  all.x = static_cast<const In*>(call.x.data_ptr()) + call.x_at;
  all.value = static_cast<const In*>(call.value.data_ptr()) + call.value_at;
  all.grad = static_cast<const In*>(call.grad.data_ptr());
  all.gate = static_cast<const Acc*>(call.gate.data_ptr());
  all.out = static_cast<In*>(call.out.data_ptr()) + call.out_at;
  all.grad_value = static_cast<In*>(call.out.data_ptr()) + call.grad_value_at;
  all.x_stride = call.x.stride(1);
  all.value_stride = call.value.stride(1);
  all.grad_stride = call.grad.stride(1);
  all.out_stride = call.out_token;
  all.num_tokens = call.num_tokens;
  all.per_token = call.per_token;
  Acc* scores = static_cast<Acc*>(call.score.data_ptr());
  const int64_t x_batch = call.x.stride(0), value_batch = call.value.stride(0);
  const int64_t grad_batch = call.grad.stride(0);
  const int64_t block = block_columns(batch, columns);
  const int64_t num_blocks = (columns + block - 1) / block;

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks, first = task % num_blocks * block;
      Slab<In, Acc> slab = all;
      slab.x += b * x_batch + first;
      slab.value += b * value_batch + first;
      slab.grad += b * grad_batch + first;
      slab.gate += first;
      slab.out += b * call.out_batch + first;
      slab.grad_value += b * call.out_batch + first;
      slab.width = std::min(block, columns - first);
      run<Walk<kActivation, kGlu, kPass, In, Acc>>(slab, sums.data());
      if (kPass != Pass::kForward) {
        std::copy_n(sums.data(), slab.width, scores + b * columns + first);
      }
    }
  });
}

template <bool kGlu, Pass kPass>
void dispatch(const Call& call) {
  for_dtype(kOp, "x_BNF", call.x, [&](auto in, auto acc) {
    with_activation(kOp, call.activation, [&](auto activation) {
      compute<decltype(activation)::value, kGlu, kPass, decltype(in), decltype(acc)>(call);
    });
  });
}

// a call on checked inputs whose results are still to be made
Call checked(const Tensor& x, const std::optional<Tensor>& value, const std::optional<Tensor>& gate,
             const std::string& activation, const std::optional<std::string>& packed,
             bool per_token) {
  VP_CHECK(x.dim() == 3, kOp, "x_BNF", "have 3 dimensions", x.dim());
  VP_CHECK(!packed || *packed == "x_first" || *packed == "x_last", kOp, "packed",
           "be x_first, x_last or None", *packed);
  VP_CHECK(!packed || (!value && x.size(2) % 2 == 0), kOp, "x_BNF",
           "be two halves of the same width where it is packed", "another");
  const int64_t columns = packed ? x.size(2) / 2 : x.size(2);
  if (value) {
    check_tensor(kOp, "value_BNF", *value, {x.size(0), x.size(1), columns}, x.scalar_type());
  }
  if (gate) check_tensor(kOp, "gate_F", *gate, {columns}, wide_type(x));
  const Tensor near = with_adjacent_columns(x);
  Call call{near, near, near, near, near, near, activation, per_token};
  if (value) call.value = with_adjacent_columns(*value);
  if (gate) call.gate = torch::stable::contiguous(*gate);
  call.batch = x.size(0), call.num_tokens = x.size(1), call.columns = columns;
  if (packed) (*packed == "x_last" ? call.x_at : call.value_at) = columns;
  call.out_batch = call.num_tokens * columns, call.out_token = columns;
  return call;
}

Tensor gated_unit_fwd(Tensor x, std::optional<Tensor> value, Tensor gate, std::string activation,
                      std::optional<std::string> packed) {
  Call call = checked(x, value, gate, activation, packed, false);
  call.out = torch::stable::new_empty(x, {call.batch, call.num_tokens, call.columns});
  value || packed ? dispatch<true, Pass::kForward>(call) : dispatch<false, Pass::kForward>(call);
  return call.out;
}

std::tuple<Tensor, Tensor> gated_unit_bwd(Tensor x, std::optional<Tensor> value,
                                          std::optional<Tensor> gate, Tensor grad,
                                          std::string activation, std::optional<std::string> packed,
                                          bool per_token) {
  Call call = checked(x, value, gate, activation, packed, per_token);
  const int64_t batch = call.batch, num_tokens = call.num_tokens, columns = call.columns;
  check_tensor(kOp, "grad_BNF", grad, {batch, num_tokens, columns}, x.scalar_type());
  VP_CHECK(!gate || !per_token, kOp, "per_token", "be false with a gate", "true");
  call.grad = with_adjacent_columns(grad);
  call.score = torch::stable::new_empty(x, {batch, columns}, wide_type(x));
  if (value) {
    call.out = torch::stable::new_empty(x, {2, batch, num_tokens, columns});
    call.grad_value_at = batch * num_tokens * columns;
  } else {
    const int64_t both = packed ? 2 * columns : columns;
    call.out = torch::stable::new_empty(x, {batch, num_tokens, both});
    call.out_at = call.x_at, call.grad_value_at = call.value_at;
    call.out_batch = num_tokens * both, call.out_token = both;
  }
  if (value || packed) {
    gate ? dispatch<true, Pass::kBackward>(call) : dispatch<true, Pass::kScore>(call);
  } else {
    gate ? dispatch<false, Pass::kBackward>(call) : dispatch<false, Pass::kScore>(call);
  }
  return {call.out, call.score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gated_unit_fwd", TORCH_BOX(&gated_unit_fwd));
  m.impl("gated_unit_bwd", TORCH_BOX(&gated_unit_bwd));
}
