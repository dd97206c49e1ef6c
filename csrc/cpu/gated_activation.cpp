// gated_activation on the CPU: out = act(x) * gate, and its backward.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/gated.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "gated_activation";

GatedPlaces contiguous_places(const Tensor& x) {
  return {0, 0, x.size(1) * x.size(2), x.size(2)};
}

Tensor gated_activation_fwd(Tensor x, Tensor gate, std::string activation) {
  check_gated(kOp, "x_BNF", x, gate);
  x = with_adjacent_columns(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  dispatch_gated<false, false>({kOp, x, x, x, gate, out, contiguous_places(x), out, activation},
                               "x_BNF");
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(Tensor x, Tensor gate, Tensor grad,
                                                std::string activation) {
  check_gated(kOp, "x_BNF", x, gate);
  check_gated_like(kOp, "grad_BNF", grad, x);
  x = with_adjacent_columns(x);
  grad = with_adjacent_columns(grad);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor grad_gate = torch::stable::new_empty(x, {x.size(0), x.size(2)}, gate.scalar_type());
  dispatch_gated<false, true>(
      {kOp, x, x, grad, gate, grad_x, contiguous_places(x), grad_gate, activation}, "x_BNF");
  return {grad_x, grad_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&gated_activation_fwd));
  m.impl("gated_activation_bwd", TORCH_BOX(&gated_activation_bwd));
}
