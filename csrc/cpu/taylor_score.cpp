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

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "tensors.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "taylor_score";

// columns whose sums stay in the first-level cache while the tokens stream by
constexpr int64_t kBlockColumns = 1024;

// part[f] += sum over `num_tokens` tokens of a[n, f] * g[n, f] for `width` adjacent columns, or of
// its magnitude where every token counts by itself
template <bool kMagnitude, typename In, typename Acc>
VP_INLINE void add_columns(const In* a, const In* g, int64_t a_stride, int64_t g_stride,
                           int64_t num_tokens, int64_t width, Acc* part) {
  constexpr int64_t lanes = kLanes<Acc>;
  const auto product = [&](int64_t n, int64_t f, int64_t count) VP_ALWAYS_INLINE {
    const auto v =
        load_first(a + n * a_stride + f, count) * load_first(g + n * g_stride + f, count);
    if constexpr (kMagnitude) {
      return absolute(v);
    } else {
      return v;
    }
  };
  const auto add = [&](int64_t n, int64_t f, int64_t count, bool four) VP_ALWAYS_INLINE {
    auto sum = load_first(part + f, count);
    if (four) {
      sum += (product(n, f, count) + product(n + 1, f, count)) +
             (product(n + 2, f, count) + product(n + 3, f, count));
    } else {
      sum += product(n, f, count);
    }
    store_first(part + f, sum, count);
  };
  const auto add_row = [&](int64_t n, bool four) VP_ALWAYS_INLINE {
    int64_t f = 0;
    for (; f + lanes <= width; f += lanes) add(n, f, lanes, four);
    if (f < width) add(n, f, width - f, four);
  };
  int64_t n = 0;
  for (; n + 4 <= num_tokens; n += 4) add_row(n, true);
  for (; n < num_tokens; ++n) add_row(n, false);
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
        auto total = load_lanes(a_unit) * load_lanes(g_unit);
        for (int64_t k = lanes; k < whole; k += lanes) {
          total += load_lanes(a_unit + k) * load_lanes(g_unit + k);
        }
        sum = sum_lanes(total);
      }
      for (int64_t k = whole; k < group_size; ++k) {
        sum += static_cast<Acc>(a_unit[k]) * static_cast<Acc>(g_unit[k]);
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
struct SumTokens {
  template <int kBytes>
  static VP_INLINE void run(const In* a, const In* g, Block block, Acc* sums) {
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
};

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

  torch::stable::parallel_for(0, batch * num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(2 * block_units * sums_per_unit);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_blocks;
      const int64_t first = task % num_blocks * block_units;
      const int64_t units = std::min(block_units, num_units - first);
      const int64_t column = first * group_size;
      run<SumTokens<kSum, In, Acc>>(a + b * a_batch + column, g + b * g_batch + column,
                                    Block{a_token, g_token, num_tokens, units, group_size},
                                    sums.data());
      Acc* to = result + b * num_units + first;
      for (int64_t u = 0; u < units; ++u) {
        to[u] = tree_sum(sums.data() + u * sums_per_unit, sums_per_unit);
      }
    }
  });
}

Tensor taylor_score(Tensor activation, Tensor gradient, int64_t group_size, bool per_token) {
  VP_CHECK(activation.dim() == 3, kOp, "activation_BNF", "have 3 dimensions", activation.dim());
  const int64_t batch = activation.size(0), columns = activation.size(2);
  check_tensor(kOp, "gradient_BNF", gradient, {batch, activation.size(1), columns},
               activation.scalar_type());
  VP_CHECK(group_size >= 1 && columns % group_size == 0, kOp, "group_size",
           "be at least 1 and divide the number of columns", group_size);
  activation = with_adjacent_columns(activation);
  gradient = with_adjacent_columns(gradient);
  Tensor out =
      torch::stable::new_empty(activation, {batch, columns / group_size}, wide_type(activation));
  for_dtype(kOp, "activation_BNF", activation, [&](auto in, auto acc) {
    using In = decltype(in);
    using Acc = decltype(acc);
    const auto run_all = !per_token        ? score<Sum::kColumns, In, Acc>
                         : group_size == 1 ? score<Sum::kColumnMagnitudes, In, Acc>
                                           : score<Sum::kUnitMagnitudes, In, Acc>;
    run_all(activation, gradient, out, group_size);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("taylor_score", TORCH_BOX(&taylor_score));
}
