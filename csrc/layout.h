// How the kernels want their tensors to lie in memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace vitprune {

// x, copied unless its last dimension is adjacent; all others may lie anywhere
inline torch::stable::Tensor with_adjacent_columns(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace vitprune
