// How the rows of a box are shared between threads on the CPU.
#include "vae_tiling.hpp"

#include <algorithm>

#include "parallel.hpp"
#include "row_ops.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace {

constexpr void (*kKernels[])(const BlendBox&, RowSpan, const float*) = {
    &base::blend_row,
#if defined(PUSA_X86_KERNELS)
    &avx2::blend_row,
    &avx512::blend_row,
#endif
};

constexpr std::int64_t kFrames = 4;             // of a task: rows of a frame follow each other, for the caches
constexpr std::int64_t kTaskElements = 16'384;  // fewer are not worth another thread

}  // namespace

void run(const BlendBox& a, int threads) {
  const std::int64_t row = a.width * a.channels, rows = a.height * ceil_div(a.frames, kFrames);
  const auto useful = static_cast<int>(std::clamp<std::int64_t>(a.frames * a.height * row / kTaskElements, 1, threads));
  const Floats columns = allocate(a.count * row);
  for (std::int64_t n = 0; n < a.count; ++n) {
    for (std::int64_t i = 0; i < row; ++i) {
      columns[n * row + i] = column_weight(a, a.tiles[n], a.left + i / a.channels);
    }
  }
  const auto kernel = kKernels[current_isa()];
  parallel(rows, useful, 0, [&](std::int64_t task, float*) {
    const std::int64_t first = task / a.height * kFrames;
    kernel(a, {task % a.height, first, std::min(first + kFrames, a.frames)}, columns.get());
  });
}

}  // namespace pusa
