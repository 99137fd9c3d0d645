// pusa_fast._native: the border between Python and C++. Raw pointers and no torch headers inside, so one
// build serves every torch. Optional at run time: everything here has a torch fallback.
#include <pybind11/pybind11.h>

#include "cpu_features.hpp"
#ifdef PUSA_ROW_OPS
#include "row_bindings.hpp"
#include "vae_tiling_bindings.hpp"
#endif

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict found;
  for (const pusa::CpuFeature& feature : pusa::cpu_features()) found[feature.name] = feature.usable;
  return found;
}

constexpr bool cuda_built() {
#ifdef PUSA_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled parts of pusa_fast.";
  m.attr("__version__") = PUSA_VERSION;
  m.def("cpu_features", &cpu_features,
        "Instruction sets by name: usable if processor and operating system both support them.");
  m.def("cuda_built", &cuda_built, "Whether this build has CUDA code, with or without a device.");
#ifdef PUSA_ROW_OPS
  pusa::bind_row_ops(m);
  pusa::bind_vae_tiling(m);
#endif
}
