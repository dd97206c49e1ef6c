// What the kernels ask of their tensors: the checks that memory safety needs, repeated below the
// Python door in its words, and how they lie in memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// VP_CHECK(ok, "gather", "rows", "be a 1-D int64 tensor", "2-D") fails with
// "gather: rows must be a 1-D int64 tensor, got 2-D".
#define VP_CHECK(condition, op, argument, rule, ...)                                       \
  do {                                                                                     \
    STD_TORCH_CHECK(condition, op, ": ", argument, " must ", rule, ", got ", __VA_ARGS__); \
  } while (false)

namespace vitprune {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const char* op, const char* name, const Tensor& x,
                         const std::vector<int64_t>& shape, ScalarType type) {
  const auto sizes = x.sizes();
  VP_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, name,
           "have the shape that the other arguments give it", "another");
  VP_CHECK(x.scalar_type() == type, op, name, "have the dtype that the other arguments give it",
           "another");
}

// x, copied unless its last dimension is adjacent; all others may lie anywhere
inline Tensor with_adjacent_columns(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// what is accumulated in: fp64 for fp64, else fp32
inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(In(), Acc()) for the dtype of x and what is accumulated in
template <typename F>
void for_dtype(const char* op, const char* name, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float(), float());
    case ScalarType::Double:
      return f(double(), double());
    case ScalarType::BFloat16:
      return f(BFloat16(), float());
    case ScalarType::Half:
      return f(Half(), float());
    default:
      VP_CHECK(false, op, name, "be float32, float64, bfloat16 or float16", "another dtype");
  }
}

}  // namespace vitprune
