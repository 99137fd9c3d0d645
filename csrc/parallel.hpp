// Shares work out between threads. Never for files that are compiled per instruction set: see row_math.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pusa {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

inline Floats allocate(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(float);
  return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

// work(block, scratch) for each block, blocks in equal consecutive shares. `work` must not throw.
template <class Work>
void parallel(std::int64_t blocks, int threads, std::int64_t scratch_floats, Work work) {
  const std::int64_t stride = ceil_div(scratch_floats, 16) * 16;
  threads = static_cast<int>(std::min<std::int64_t>(threads, blocks));
#if defined(_OPENMP)
  if (threads > 1) {
    const Floats scratch = allocate(stride * threads);
    float* const first = scratch.get();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t block = 0; block < blocks; ++block) work(block, first + stride * omp_get_thread_num());
    return;
  }
#endif
  const Floats scratch = allocate(stride);
  for (std::int64_t block = 0; block < blocks; ++block) work(block, scratch.get());
}

}  // namespace pusa
