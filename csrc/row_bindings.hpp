#pragma once

#include <pybind11/pybind11.h>

namespace pusa {

// Adds the row kernels and the choice of their instruction set to the module.
void bind_row_ops(pybind11::module_& m);

}  // namespace pusa
