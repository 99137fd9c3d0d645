#pragma once

#include <pybind11/pybind11.h>

namespace pusa {

// Adds blend_box to the module.
void bind_vae_tiling(pybind11::module_& m);

}  // namespace pusa
