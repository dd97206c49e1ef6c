// What gather_all checks of its arguments on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gather_table.h"
#include "tensors.h"

namespace vitprune {

inline void check_table(const Tensor& table) {
  VP_CHECK(table.dim() == 1 && table.scalar_type() == ScalarType::Int && table.is_contiguous() &&
               table.is_cpu(),
           "gather_all", "table", "be a contiguous 1-D int32 tensor on the CPU", "another tensor");
  GatherTableView(static_cast<const int32_t*>(table.data_ptr())).check(table.numel());
}

// What happens to numbers on the way from one dtype to another.
inline Cast cast_between(ScalarType from, ScalarType to) {
  if (from == to) return Cast::kNone;
  if (from == ScalarType::Float && to == ScalarType::BFloat16) return Cast::kFloatToBFloat16;
  if (from == ScalarType::Float && to == ScalarType::Half) return Cast::kFloatToHalf;
  if (from == ScalarType::BFloat16 && to == ScalarType::Float) return Cast::kBFloat16ToFloat;
  VP_CHECK(from == ScalarType::Half && to == ScalarType::Float, "gather_all", "targets",
           "have the dtype of their source, or be bfloat16 or float16 where one of the two is "
           "float32",
           "another pair of dtypes");
  return Cast::kHalfToFloat;
}

// Also copies sources whose columns are not adjacent. Everything is on the CPU, or on the GPU of
// the first source.
inline void check_matrices(const GatherTableView& table, std::vector<Tensor>& sources,
                           const std::vector<Tensor>& targets, const std::vector<int64_t>& entries,
                           bool on_gpu) {
  VP_CHECK(targets.size() == sources.size() && entries.size() == sources.size(), "gather_all",
           "targets and entries", "be as many as the sources",
           std::to_string(targets.size()) + " and " + std::to_string(entries.size()));
  for (size_t i = 0; i < sources.size(); ++i) {
    VP_CHECK(entries[i] >= 0 && entries[i] < table.num_entries(), "gather_all", "entries",
             "hold numbers from 0 to " + std::to_string(table.num_entries() - 1), entries[i]);
    const GatherEntry& entry = table.entry(entries[i]);
    const auto size = static_cast<int64_t>(sources[i].element_size());
    VP_CHECK(size == 1 || size == 2 || size == 4 || size == 8 || size == 16, "gather_all",
             "sources", "have elements of 1, 2, 4, 8 or 16 bytes", size);
    for (const auto& each : {sources[i], targets[i]}) {
      VP_CHECK((on_gpu ? each.is_cuda() : each.is_cpu()) &&
                   each.get_device_index() == sources[0].get_device_index(),
               "gather_all", "sources and targets", "be on one device", "several");
    }
    VP_CHECK(sources[i].dim() == 2 && sources[i].size(0) == entry.source_rows &&
                 sources[i].size(1) == entry.source_columns,
             "gather_all", "sources", "have the shape of their entry of the table", "another one");
    VP_CHECK(targets[i].dim() == 2 && targets[i].is_contiguous() &&
                 targets[i].size(0) == entry.rows && targets[i].size(1) == entry.columns,
             "gather_all", "targets", "be contiguous and have the shape their entry gives",
             "another one");
    sources[i] = with_adjacent_columns(sources[i]);
  }
}

}  // namespace vitprune
