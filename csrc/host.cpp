// The only pybind11 unit: facts about the build, and the table of a gather. No torch header, no op
// goes through it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "gather_table.h"

namespace py = pybind11;

namespace {

using vitprune::GatherTableBuilder;
using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Selection = std::tuple<int64_t, int64_t, std::optional<Numbers>, std::optional<Numbers>>;

GatherTableBuilder::Index narrow(const Numbers& numbers, const char* name, int64_t size) {
  if (numbers.ndim() != 1) {
    throw std::invalid_argument(std::string("GatherTable: ") + name +
                                " must have 1 dimension, got " + std::to_string(numbers.ndim()));
  }
  const int64_t* from = numbers.data();
  GatherTableBuilder::Index index(numbers.size());
  for (size_t i = 0; i < index.size(); ++i) {
    // what int32 cannot hold is out of range in any case
    index[i] = static_cast<int32_t>(std::clamp<int64_t>(from[i], -2, size));
  }
  return index;
}

py::array_t<int32_t> gather_table(const std::vector<Selection>& selections) {
  GatherTableBuilder builder;
  GatherTableBuilder::Index row_index, column_index;
  for (const auto& [num_rows, num_columns, rows, columns] : selections) {
    if (rows) row_index = narrow(*rows, "rows", num_rows);
    if (columns) column_index = narrow(*columns, "columns", num_columns);
    builder.add(num_rows, num_columns, rows ? &row_index : nullptr,
                columns ? &column_index : nullptr);
  }
  const std::vector<int32_t> words = builder.words();
  return py::array_t<int32_t>(static_cast<py::ssize_t>(words.size()), words.data());
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = VP_TORCH_VERSION;
    info["cuda"] = VP_CUDA_VERSION;
    info["cuda_arch_list"] = VP_CUDA_ARCH_LIST;
    info["cpu_instructions"] = vitprune::isa_name(vitprune::isa());
    return info;
  });
  m.def("gather_table", &gather_table, py::arg("selections"));
}
