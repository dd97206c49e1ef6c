// Attention on packed qkv on the CPU, forward and backward: what attention_score and
// gated_attention share. Their ops check all arguments; see attention_score.cpp for the sums.
//
// B batch, N tokens, H heads, L live heads, K head dim.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace vitprune {

// Which heads and keys are computed.
struct Selected {
  std::vector<int64_t> heads;                   // the live ones, in order
  const torch::stable::Tensor* gate = nullptr;  // (H,), contiguous, fp32 or fp64; none for 1
  const torch::stable::Tensor* keys = nullptr;  // (B, N), contiguous, bool; none for all
  bool compact = true;                          // whether the output has the live heads alone
};

// which results are asked for
struct Wanted {
  bool qkv, head, qk_dim, v_dim;
};

// All heads of qkv, without gates.
Selected all_heads(const torch::stable::Tensor& qkv);

void check_qkv(const char* op, const torch::stable::Tensor& qkv);

// fp64 for fp64, else fp32
torch::headeronly::ScalarType wide_type(const torch::stable::Tensor& x);

void attention_forward(const char* op, const Selected& selected,
                       const torch::stable::Tensor& qkv,  // (B, N, 3, H, K)
                       double scale,
                       torch::stable::Tensor& out,   // (B, N, L or H, K), contiguous
                       torch::stable::Tensor* raw,   // (B, N, L, K), contiguous, or none
                       torch::stable::Tensor& lse);  // (B, L, N), contiguous

// Results that are not wanted are not written. Heads that are not selected, and keys, are not
// written either: dqkv has to be 0 there.
void attention_backward(const char* op, const Selected& selected, Wanted wanted,
                        const torch::stable::Tensor& grad,  // (B, N, L or H, K)
                        const torch::stable::Tensor& qkv,   // (B, N, 3, H, K)
                        const torch::stable::Tensor& out,   // (B, N, L, K), before the gate
                        const torch::stable::Tensor& lse,   // (B, L, N), contiguous
                        double scale, bool per_token,
                        torch::stable::Tensor& dqkv,     // (B, N, 3, H, K), contiguous
                        torch::stable::Tensor& heads,    // (B, L)
                        torch::stable::Tensor& qk_dims,  // (B, L, K)
                        torch::stable::Tensor& v_dims);  // (B, L, K)

}  // namespace vitprune
