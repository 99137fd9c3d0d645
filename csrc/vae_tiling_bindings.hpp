#pragma once

#include <pybind11/pybind11.h>

namespace pusa {

// Adds the tile plan and the passes over tiles and frames to the module.
void bind_vae_tiling(pybind11::module_& m);

}  // namespace pusa
