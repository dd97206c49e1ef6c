// What the kernels share that sum each column over the tokens.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace vitprune {

// a partial sum stays short, so the rounding error grows with N / 32 and not with N
constexpr int64_t kTokensPerPart = 32;
// columns whose sums stay in the first-level cache while the tokens stream by
constexpr int64_t kMostColumns = 4096;
constexpr int64_t kLeastColumns = 256;

// Columns of one task. Whole rows where the samples keep all threads busy: memory is read fastest
// without gaps. The bits are the same for every choice, as each column has its own sum.
inline int64_t block_columns(int64_t batch, int64_t columns) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks_per_sample = (threads + batch - 1) / batch;
  const int64_t share = (columns + tasks_per_sample - 1) / tasks_per_sample;
  const int64_t whole_lines = (share + 63) / 64 * 64;
  return std::clamp(whole_lines, kLeastColumns, kMostColumns);
}

}  // namespace vitprune
