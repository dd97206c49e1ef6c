// taylor_score on the CPU: s[b, u] = sum over tokens n and the unit's columns k of a * g.
//
// B batch, N tokens, F columns, K columns per unit, U = F / K units.
// Every column is summed over the tokens in one fixed order (four at a time, a new partial sum for
// every 32), and the K columns of a unit as one fixed tree. Products are rounded before they are
// added (-ffp-contract=off), so the bits depend on the B-th sample alone: not on threads, batch,
// lane or instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vitprune::Isa;

// columns whose sums stay in the first-level cache while the tokens stream by
constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kTokensAtOnce = 4;
// a partial sum stays short, so the rounding error grows with N / 32 and not with N
constexpr int64_t kTokensPerPart = 32;

template <typename Acc>
constexpr int64_t kLanes = 64 / sizeof(Acc);

// the compiler splits these into whatever registers the target has
typedef float F32x16 __attribute__((vector_size(64)));
typedef double F64x8 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

VP_INLINE F32x16 load_lanes(const float* x) {
  F32x16 v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

VP_INLINE F64x8 load_lanes(const double* x) {
  F64x8 v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

VP_INLINE U32x16 load_bits(const void* x) {
  U16x16 bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, U32x16);
}

VP_INLINE F32x16 load_lanes(const BFloat16* x) {
  return reinterpret_cast<F32x16>(load_bits(x) << 16);
}

VP_INLINE F32x16 load_lanes(const Half* x) {
  const U32x16 bits = load_bits(x);
  const U32x16 magnitude = bits & 0x7fffu;
  // normal numbers, infinity and NaN: move the exponent from bias 15 to bias 127
  const U32x16 wide = (magnitude << 13) + ((127u - 15u) << 23);
  const U32x16 special = wide + ((127u - 15u) << 23);
  // subnormal numbers: an integer count of 2^-24, exact in fp32 and never subnormal there
  const F32x16 half_bias = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f,
                            0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f};
  const U32x16 tiny =
      reinterpret_cast<U32x16>(reinterpret_cast<F32x16>(magnitude + (126u << 23)) - half_bias);
  const U32x16 value = magnitude < 0x0400u ? tiny : (magnitude >= 0x7c00u ? special : wide);
  return reinterpret_cast<F32x16>(value | ((bits & 0x8000u) << 16));
}

template <typename V, typename In>
VP_INLINE V product(const In* a, const In* g) {
  return load_lanes(a) * load_lanes(g);
}

template <typename Acc, typename In>
VP_INLINE Acc product1(const In* a, const In* g) {
  return static_cast<Acc>(*a) * static_cast<Acc>(*g);
}

// part[f] += sum over `num_tokens` tokens of a[n, f] * g[n, f] for `width` adjacent columns
template <typename In, typename Acc>
VP_INLINE void add_columns(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                           int64_t num_tokens, int64_t width, Acc* part) {
  using V = decltype(load_lanes(a));
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t n = 0;
  for (; n + kTokensAtOnce <= num_tokens; n += kTokensAtOnce) {
    const In *a0 = a + n * a_stride, *a1 = a0 + a_stride, *a2 = a1 + a_stride, *a3 = a2 + a_stride;
    const In *g0 = g + n * g_stride, *g1 = g0 + g_stride, *g2 = g1 + g_stride, *g3 = g2 + g_stride;
    int64_t f = 0;
    for (; f + lanes <= width; f += lanes) {
      V sum;
      std::memcpy(&sum, part + f, sizeof sum);
      sum += (product<V>(a0 + f, g0 + f) + product<V>(a1 + f, g1 + f)) +
             (product<V>(a2 + f, g2 + f) + product<V>(a3 + f, g3 + f));
      std::memcpy(part + f, &sum, sizeof sum);
    }
    for (; f < width; ++f) {
      part[f] += (product1<Acc>(a0 + f, g0 + f) + product1<Acc>(a1 + f, g1 + f)) +
                 (product1<Acc>(a2 + f, g2 + f) + product1<Acc>(a3 + f, g3 + f));
    }
  }
  for (; n < num_tokens; ++n) {
    for (int64_t f = 0; f < width; ++f) {
      part[f] += product1<Acc>(a + n * a_stride + f, g + n * g_stride + f);
    }
  }
}

// sums[f] = sum over all tokens; `sums` has room for a second row that holds the partial sums
template <typename In, typename Acc>
VP_INLINE void sum_columns(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                           int64_t num_tokens, int64_t width, Acc* sums) {
  Acc* part = sums + width;
  std::fill_n(sums, width, Acc(0));
  for (int64_t n = 0; n < num_tokens; n += kTokensPerPart) {
    std::fill_n(part, width, Acc(0));
    add_columns(a + n * a_stride, g + n * g_stride, a_stride, g_stride,
                std::min(kTokensPerPart, num_tokens - n), width, part);
    for (int64_t f = 0; f < width; ++f) sums[f] += part[f];
  }
}

template <typename In, typename Acc>
using SumColumns = void (*)(const In*, const In*, int64_t, int64_t, int64_t, int64_t, Acc*);

template <typename In, typename Acc>
void sum_columns_baseline(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                          int64_t num_tokens, int64_t width, Acc* sums) {
  sum_columns(a, g, a_stride, g_stride, num_tokens, width, sums);
}

#if VP_X86
template <typename In, typename Acc>
VP_TARGET(VP_AVX2)
void sum_columns_avx2(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                      int64_t num_tokens, int64_t width, Acc* sums) {
  sum_columns(a, g, a_stride, g_stride, num_tokens, width, sums);
}

template <typename In, typename Acc>
VP_TARGET(VP_AVX512)
void sum_columns_avx512(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                        int64_t num_tokens, int64_t width, Acc* sums) {
  sum_columns(a, g, a_stride, g_stride, num_tokens, width, sums);
}
#endif

template <typename In, typename Acc>
SumColumns<In, Acc> choose_sum_columns() {
#if VP_X86
  if (vitprune::isa() >= Isa::kAvx512) return sum_columns_avx512<In, Acc>;
  if (vitprune::isa() >= Isa::kAvx2) return sum_columns_avx2<In, Acc>;
#endif
  return sum_columns_baseline<In, Acc>;
}

// the same tree for every unit of `count` columns
template <typename Acc>
Acc tree_sum(const Acc* x, int64_t count) {
  if (count <= 8) {
    Acc sum = x[0];
    for (int64_t k = 1; k < count; ++k) sum += x[k];
    return sum;
  }
  return tree_sum(x, count / 2) + tree_sum(x + count / 2, count - count / 2);
}

template <typename In, typename Acc>
void score(const Tensor& activation,  // (B, N, F)
           const Tensor& gradient,    // (B, N, F)
           Tensor& out,               // (B, U)
           int64_t group_size) {
  const int64_t batch = activation.size(0), num_tokens = activation.size(1);
  const int64_t num_units = out.size(1);
  if (batch == 0 || num_units == 0) return;
  const In* a = static_cast<const In*>(activation.data_ptr());
  const In* g = static_cast<const In*>(gradient.data_ptr());
  Acc* result = static_cast<Acc*>(out.data_ptr());
  const int64_t a_batch = activation.stride(0), a_token = activation.stride(1);
  const int64_t g_batch = gradient.stride(0), g_token = gradient.stride(1);
  const int64_t block_units = std::min(num_units, std::max<int64_t>(1, kBlockColumns / group_size));
  const int64_t num_blocks = (num_units + block_units - 1) / block_units;
  const auto sum = choose_sum_columns<In, Acc>();

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block_units * group_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks;
      const int64_t first = task % num_blocks * block_units;
      const int64_t units = std::min(block_units, num_units - first);
      const int64_t column = first * group_size;
      sum(a + b * a_batch + column, g + b * g_batch + column, a_token, g_token, num_tokens,
          units * group_size, sums.data());
      Acc* to = result + b * num_units + first;
      for (int64_t u = 0; u < units; ++u) {
        to[u] = tree_sum(sums.data() + u * group_size, group_size);
      }
    }
  });
}

// columns must be adjacent; tokens and samples may lie anywhere
Tensor with_adjacent_columns(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

Tensor taylor_score(Tensor activation, Tensor gradient, int64_t group_size) {
  VP_CHECK(activation.dim() == 3, "taylor_score", "activation_BNF", "have 3 dimensions",
           activation.dim());
  VP_CHECK(gradient.dim() == 3 && std::equal(activation.sizes().begin(), activation.sizes().end(),
                                             gradient.sizes().begin()),
           "taylor_score", "gradient_BNF", "have the shape of activation_BNF", "another");
  VP_CHECK(gradient.scalar_type() == activation.scalar_type(), "taylor_score", "gradient_BNF",
           "have the dtype of activation_BNF", "another");
  VP_CHECK(group_size >= 1 && activation.size(2) % group_size == 0, "taylor_score", "group_size",
           "be at least 1 and divide the number of columns", group_size);
  activation = with_adjacent_columns(activation);
  gradient = with_adjacent_columns(gradient);
  const ScalarType type = activation.scalar_type();
  const ScalarType out_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(
      activation, {activation.size(0), activation.size(2) / group_size}, out_type);
  switch (type) {
    case ScalarType::Float:
      score<float, float>(activation, gradient, out, group_size);
      break;
    case ScalarType::Double:
      score<double, double>(activation, gradient, out, group_size);
      break;
    case ScalarType::BFloat16:
      score<BFloat16, float>(activation, gradient, out, group_size);
      break;
    case ScalarType::Half:
      score<Half, float>(activation, gradient, out, group_size);
      break;
    default:
      VP_CHECK(false, "taylor_score", "activation_BNF", "be float32, float64, bfloat16 or float16",
               "another dtype");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("taylor_score", TORCH_BOX(&taylor_score));
}
