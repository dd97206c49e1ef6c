// taylor_score on the CPU: s[b, u] = sum over tokens n and the unit's columns k of a * g, or with
// per_token the sum over tokens of |sum over the columns|.
//
// B batch, N tokens, F columns, K columns per unit, U = F / K units.
// Every column is summed over the tokens in one fixed order (four at a time, a new partial sum for
// every 32), and the K columns of a unit as one fixed tree. With per_token the columns of a unit
// are added first, lane by lane and then as one fixed tree of lanes. Products are rounded before
// they are added (-ffp-contract=off), so the bits depend on the B-th sample alone: not on threads,
// batch, lane or instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace vitprune;

// columns whose sums stay in the first-level cache while the tokens stream by
constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kTokensAtOnce = 4;

// what a column adds to its sum: the product, or its magnitude where every token counts by itself
template <bool kMagnitude, typename In>
VP_INLINE auto product(const In* a, const In* g) {
  const auto v = load_lanes(a) * load_lanes(g);
  if constexpr (kMagnitude) {
    return absolute(v);
  } else {
    return v;
  }
}

template <bool kMagnitude, typename Acc, typename In>
VP_INLINE Acc product1(const In* a, const In* g) {
  const Acc x = static_cast<Acc>(*a) * static_cast<Acc>(*g);
  return kMagnitude ? std::fabs(x) : x;
}

// part[f] += sum over `num_tokens` tokens of a[n, f] * g[n, f] for `width` adjacent columns
template <bool kMagnitude, typename In, typename Acc>
VP_INLINE void add_columns(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                           int64_t num_tokens, int64_t width, Acc* part) {
  constexpr bool M = kMagnitude;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t n = 0;
  for (; n + kTokensAtOnce <= num_tokens; n += kTokensAtOnce) {
    const In *a0 = a + n * a_stride, *a1 = a0 + a_stride, *a2 = a1 + a_stride, *a3 = a2 + a_stride;
    const In *g0 = g + n * g_stride, *g1 = g0 + g_stride, *g2 = g1 + g_stride, *g3 = g2 + g_stride;
    int64_t f = 0;
    for (; f + lanes <= width; f += lanes) {
      auto sum = load_lanes(part + f);
      sum += (product<M>(a0 + f, g0 + f) + product<M>(a1 + f, g1 + f)) +
             (product<M>(a2 + f, g2 + f) + product<M>(a3 + f, g3 + f));
      store_lanes(part + f, sum);
    }
    for (; f < width; ++f) {
      part[f] += (product1<M, Acc>(a0 + f, g0 + f) + product1<M, Acc>(a1 + f, g1 + f)) +
                 (product1<M, Acc>(a2 + f, g2 + f) + product1<M, Acc>(a3 + f, g3 + f));
    }
  }
  for (; n < num_tokens; ++n) {
    for (int64_t f = 0; f < width; ++f) {
      part[f] += product1<M, Acc>(a + n * a_stride + f, g + n * g_stride + f);
    }
  }
}

// part[u] += sum over tokens of |sum over the unit's columns of a * g|
template <typename In, typename Acc>
VP_INLINE void add_unit_magnitudes(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                                   int64_t num_tokens, int64_t units, int64_t group_size,
                                   Acc* part) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t whole = group_size / lanes * lanes;
  for (int64_t n = 0; n < num_tokens; ++n, a += a_stride, g += g_stride) {
    for (int64_t u = 0; u < units; ++u) {
      const In *a_unit = a + u * group_size, *g_unit = g + u * group_size;
      Acc sum = 0;
      if (whole > 0) {
        auto total = product<false>(a_unit, g_unit);
        for (int64_t k = lanes; k < whole; k += lanes) {
          total += product<false>(a_unit + k, g_unit + k);
        }
        sum = sum_lanes(total);
      }
      for (int64_t k = whole; k < group_size; ++k) {
        sum += product1<false, Acc>(a_unit + k, g_unit + k);
      }
      part[u] += std::fabs(sum);
    }
  }
}

// how the columns of a block are summed, and over what
enum class Sum { kColumns, kColumnMagnitudes, kUnitMagnitudes };

struct Block {
  int64_t a_stride, g_stride, num_tokens, units, group_size;
};

// sums[i] = sum over all tokens, of every column or of every unit; `sums` has room for a second
// row that holds the partial sums
template <Sum kSum, typename In, typename Acc>
VP_INLINE void sum_tokens(const In* a, const In* g, const Block& block, Acc* sums) {
  const int64_t columns = block.units * block.group_size;
  const int64_t width = kSum == Sum::kUnitMagnitudes ? block.units : columns;
  Acc* part = sums + width;
  std::fill_n(sums, width, Acc(0));
  for (int64_t n = 0; n < block.num_tokens; n += kTokensPerPart) {
    const int64_t tokens = std::min(kTokensPerPart, block.num_tokens - n);
    const In *a_part = a + n * block.a_stride, *g_part = g + n * block.g_stride;
    std::fill_n(part, width, Acc(0));
    if constexpr (kSum == Sum::kUnitMagnitudes) {
      add_unit_magnitudes(a_part, g_part, block.a_stride, block.g_stride, tokens, block.units,
                          block.group_size, part);
    } else {
      add_columns<kSum == Sum::kColumnMagnitudes>(a_part, g_part, block.a_stride, block.g_stride,
                                                  tokens, columns, part);
    }
    for (int64_t f = 0; f < width; ++f) sums[f] += part[f];
  }
}

template <typename In, typename Acc>
using SumTokens = void (*)(const In*, const In*, const Block&, Acc*);

template <Sum kSum, typename In, typename Acc>
void sum_tokens_baseline(const In* a, const In* g, const Block& block, Acc* sums) {
  sum_tokens<kSum>(a, g, block, sums);
}

#if VP_X86
template <Sum kSum, typename In, typename Acc>
VP_TARGET(VP_AVX2)
void sum_tokens_avx2(const In* a, const In* g, const Block& block, Acc* sums) {
  sum_tokens<kSum>(a, g, block, sums);
}

template <Sum kSum, typename In, typename Acc>
VP_TARGET(VP_AVX512)
void sum_tokens_avx512(const In* a, const In* g, const Block& block, Acc* sums) {
  sum_tokens<kSum>(a, g, block, sums);
}
#endif

template <Sum kSum, typename In, typename Acc>
SumTokens<In, Acc> choose_sum_tokens() {
#if VP_X86
  if (isa() >= Isa::kAvx512) return sum_tokens_avx512<kSum, In, Acc>;
  if (isa() >= Isa::kAvx2) return sum_tokens_avx2<kSum, In, Acc>;
#endif
  return sum_tokens_baseline<kSum, In, Acc>;
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

template <Sum kSum, typename In, typename Acc>
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
  // a unit's magnitude is already one number, a unit's columns are still to be added
  const int64_t sums_per_unit = kSum == Sum::kUnitMagnitudes ? 1 : group_size;
  const auto sum = choose_sum_tokens<kSum, In, Acc>();

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block_units * sums_per_unit);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks;
      const int64_t first = task % num_blocks * block_units;
      const int64_t units = std::min(block_units, num_units - first);
      const int64_t column = first * group_size;
      sum(a + b * a_batch + column, g + b * g_batch + column,
          Block{a_token, g_token, num_tokens, units, group_size}, sums.data());
      Acc* to = result + b * num_units + first;
      for (int64_t u = 0; u < units; ++u) {
        to[u] = tree_sum(sums.data() + u * sums_per_unit, sums_per_unit);
      }
    }
  });
}

template <typename In, typename Acc>
void score(const Tensor& activation, const Tensor& gradient, Tensor& out, int64_t group_size,
           bool per_token) {
  if (!per_token) {
    score<Sum::kColumns, In, Acc>(activation, gradient, out, group_size);
  } else if (group_size == 1) {
    score<Sum::kColumnMagnitudes, In, Acc>(activation, gradient, out, group_size);
  } else {
    score<Sum::kUnitMagnitudes, In, Acc>(activation, gradient, out, group_size);
  }
}

Tensor taylor_score(Tensor activation, Tensor gradient, int64_t group_size, bool per_token) {
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
      score<float, float>(activation, gradient, out, group_size, per_token);
      break;
    case ScalarType::Double:
      score<double, double>(activation, gradient, out, group_size, per_token);
      break;
    case ScalarType::BFloat16:
      score<BFloat16, float>(activation, gradient, out, group_size, per_token);
      break;
    case ScalarType::Half:
      score<Half, float>(activation, gradient, out, group_size, per_token);
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
