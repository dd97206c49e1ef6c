// gated_glu on the CPU: out = act(gate) * value * unit gate, and its backward. Gate and value may
// be the halves of one tensor, and so may their gradients.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/gated.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "gated_glu";

Tensor gated_glu_fwd(Tensor gate, Tensor value, Tensor unit, std::string activation) {
  check_gated(kOp, "gate_BNF", gate, unit);
  check_gated_like(kOp, "value_BNF", value, gate);
  gate = with_adjacent_columns(gate);
  value = with_adjacent_columns(value);
  const int64_t batch = gate.size(0), num_tokens = gate.size(1), columns = gate.size(2);
  Tensor out = torch::stable::new_empty(gate, {batch, num_tokens, columns}, gate.scalar_type());
  const GatedPlaces places = {0, 0, num_tokens * columns, columns};
  dispatch_gated<true, false>({kOp, gate, value, gate, unit, out, places, out, activation},
                              "gate_BNF");
  return out;
}

std::tuple<Tensor, Tensor> gated_glu_bwd(Tensor gate, Tensor value, Tensor unit, Tensor grad,
                                         std::string activation,
                                         std::optional<std::string> packed) {
  check_gated(kOp, "gate_BNF", gate, unit);
  check_gated_like(kOp, "value_BNF", value, gate);
  check_gated_like(kOp, "grad_BNF", grad, gate);
  VP_CHECK(!packed || *packed == "gate_first" || *packed == "gate_last", kOp, "packed",
           "be gate_first, gate_last or None", *packed);
  gate = with_adjacent_columns(gate);
  value = with_adjacent_columns(value);
  grad = with_adjacent_columns(grad);
  const int64_t batch = gate.size(0), num_tokens = gate.size(1), columns = gate.size(2);
  const ScalarType type = gate.scalar_type();
  Tensor gradients = packed ? torch::stable::new_empty(gate, {batch, num_tokens, 2 * columns}, type)
                            : torch::stable::new_empty(gate, {2, batch, num_tokens, columns}, type);
  Tensor grad_unit = torch::stable::new_empty(gate, {batch, columns}, unit.scalar_type());
  GatedPlaces places = {0, batch * num_tokens * columns, num_tokens * columns, columns};
  if (packed) {
    const bool gate_last = *packed == "gate_last";
    places = {gate_last ? columns : 0, gate_last ? 0 : columns, 2 * num_tokens * columns,
              2 * columns};
  }
  dispatch_gated<true, true>(
      {kOp, gate, value, grad, unit, gradients, places, grad_unit, activation}, "gate_BNF");
  return {gradients, grad_unit};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gated_glu_fwd", TORCH_BOX(&gated_glu_fwd));
  m.impl("gated_glu_bwd", TORCH_BOX(&gated_glu_bwd));
}
