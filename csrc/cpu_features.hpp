// What this processor and its operating system let a kernel use, read at run time, never at build time.
#pragma once

#include <array>

namespace pusa {

struct CpuFeature {
  const char* name;
  bool usable;
};

// In the order in which the dispatcher checks them. All false on processors other than x86-64. "amx" means bf16
// tiles; on Linux a process must request the tile state (arch_prctl) before its first tile instruction.
std::array<CpuFeature, 6> cpu_features();

}  // namespace pusa
