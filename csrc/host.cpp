// The only pybind11 unit: facts about the build. No torch header, no op goes through it.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_host, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = VP_TORCH_VERSION;
    info["cuda"] = VP_CUDA_VERSION;
    info["cuda_arch_list"] = VP_CUDA_ARCH_LIST;
    info["cpu_instructions"] = vitprune::isa_name(vitprune::isa());
    return info;
  });
}
