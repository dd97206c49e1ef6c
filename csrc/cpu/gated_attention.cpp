// gated_attention on the CPU: the attention of attention_score.cpp over live heads, times a gate
// per head, and its backward. With the output o before its gate g and delta = sum_k o dout:
//   dq = g scale dS k   dk = g scale dS^T q   dv = g P^T dout   dg = sum over tokens of delta
// so nothing is divided by the gate. Keys that are masked are not gathered at all.
//
// B batch, N tokens, H heads, L live heads, K head dim; packed qkv is (B, N, 3, H, K).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/attention.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace vitprune;

const char* const kOp = "gated_attention";

// What the arguments select, checked; gate and mask are made contiguous and have to live on.
Selected selection_of(const Tensor& qkv, std::optional<Tensor>& gate, std::optional<Tensor>& mask,
                      std::vector<int64_t> live, bool compact) {
  int64_t last = -1;
  for (const int64_t head : live) {
    VP_CHECK(last < head && head < qkv.size(3), kOp, "live_heads",
             "hold numbers of heads, each once, in ascending order", head);
    last = head;
  }
  Selected selected;
  selected.heads = std::move(live);
  selected.compact = compact;
  if (gate) {
    VP_CHECK(gate->dim() == 1 && gate->size(0) == qkv.size(3), kOp, "gate_H",
             "have one gate per head", "another shape");
    VP_CHECK(gate->scalar_type() == wide_type(qkv), kOp, "gate_H",
             "be float64 for float64 and else float32", "another dtype");
    gate = torch::stable::contiguous(*gate);
    selected.gate = &*gate;
  }
  if (mask) {
    VP_CHECK(mask->dim() == 2 && mask->size(0) == qkv.size(0) && mask->size(1) == qkv.size(1), kOp,
             "key_mask_BN", "have shape (B, N)", "another");
    VP_CHECK(mask->scalar_type() == ScalarType::Bool, kOp, "key_mask_BN", "be bool",
             "another dtype");
    mask = torch::stable::contiguous(*mask);
    selected.keys = &*mask;
  }
  return selected;
}

void fill_with_zeros(Tensor& x) {
  // no output has gaps
  std::memset(x.data_ptr(), 0, x.numel() * x.element_size());
}

std::tuple<Tensor, Tensor, Tensor> gated_attention_fwd(Tensor qkv, std::optional<Tensor> gate,
                                                       std::optional<Tensor> mask,
                                                       std::vector<int64_t> live, double scale,
                                                       bool compact, bool needs_raw) {
  check_qkv(kOp, qkv);
  qkv = with_adjacent_columns(qkv);
  const Selected selected = selection_of(qkv, gate, mask, std::move(live), compact);
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4);
  const int64_t num_live = selected.heads.size();
  Tensor out = torch::stable::new_empty(qkv, {batch, tokens, compact ? num_live : heads, dims});
  if (out.size(2) > num_live) fill_with_zeros(out);
  std::vector<int64_t> raw_shape = {0};
  if (needs_raw) raw_shape = {batch, tokens, num_live, dims};
  Tensor raw = torch::stable::new_empty(qkv, raw_shape);
  Tensor lse = torch::stable::new_empty(qkv, {batch, num_live, tokens}, wide_type(qkv));
  attention_forward(kOp, selected, qkv, scale, out, needs_raw ? &raw : nullptr, lse);
  return {out, raw, lse};
}

// out is the output before the gate, (B, N, L, K), or, without a gate, what forward returned
std::tuple<Tensor, Tensor> gated_attention_bwd(Tensor grad, Tensor qkv, std::optional<Tensor> gate,
                                               std::optional<Tensor> mask, Tensor out, Tensor lse,
                                               std::vector<int64_t> live, double scale,
                                               bool compact, bool raw, bool needs_qkv) {
  check_qkv(kOp, qkv);
  const Selected selected = selection_of(qkv, gate, mask, std::move(live), compact);
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), dims = qkv.size(4);
  const int64_t num_live = selected.heads.size(), num_out = compact ? num_live : qkv.size(3);
  VP_CHECK(raw || (!gate && num_live == qkv.size(3)), kOp, "raw",
           "be True with gates or dead heads", "False");
  const auto check = [&](const char* name, const Tensor& x, int64_t heads) {
    VP_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(1) == tokens && x.size(2) == heads &&
                 x.size(3) == dims,
             kOp, name, "have the shape of what forward returned", "another");
    VP_CHECK(x.scalar_type() == qkv.scalar_type(), kOp, name, "have the dtype of qkv_BN3HK",
             "another");
  };
  check("grad_out_BNHK", grad, num_out);
  check("out_BNLK", out, num_live);
  VP_CHECK(
      lse.dim() == 3 && lse.size(0) == batch && lse.size(1) == num_live && lse.size(2) == tokens,
      kOp, "lse_BLN", "have shape (B, L, N)", "another");
  VP_CHECK(lse.scalar_type() == wide_type(qkv), kOp, "lse_BLN",
           "be float64 for float64 and else float32", "another dtype");
  grad = with_adjacent_columns(grad);
  qkv = with_adjacent_columns(qkv);
  out = with_adjacent_columns(out);
  lse = torch::stable::contiguous(lse);
  std::vector<int64_t> shape = {0};
  if (needs_qkv) shape = {batch, tokens, 3, qkv.size(3), dims};
  Tensor dqkv = torch::stable::new_empty(qkv, shape);
  if (mask || num_live < qkv.size(3)) fill_with_zeros(dqkv);
  Tensor heads = torch::stable::new_empty(qkv, {batch, num_live}, wide_type(qkv));
  Tensor nothing = torch::stable::new_empty(qkv, {0}, wide_type(qkv));
  attention_backward(kOp, selected, {needs_qkv, true, false, false}, grad, qkv, out, lse, scale,
                     false, dqkv, heads, nothing, nothing);
  std::vector<int64_t> gates = {0};
  if (raw) gates = {qkv.size(3)};
  Tensor dgate = torch::stable::new_empty(qkv, gates, wide_type(qkv));
  fill_with_zeros(dgate);
  const auto sum_over_samples = [&](auto zero) {
    using Acc = decltype(zero);
    const Acc* from = static_cast<const Acc*>(heads.data_ptr());
    Acc* to = static_cast<Acc*>(dgate.data_ptr());
    for (int64_t slot = 0; slot < num_live; ++slot) {
      double sum = 0;
      for (int64_t b = 0; b < batch; ++b) sum += from[b * num_live + slot];
      to[selected.heads[slot]] = static_cast<Acc>(sum);
    }
  };
  if (raw && wide_type(qkv) == ScalarType::Double) {
    sum_over_samples(double());
  } else if (raw) {
    sum_over_samples(float());
  }
  return {dqkv, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gated_attention_fwd", TORCH_BOX(&gated_attention_fwd));
  m.impl("gated_attention_bwd", TORCH_BOX(&gated_attention_bwd));
}
