// Boxes of a picture made from the tiles that cover it, for the VAE: one operation gathers, places, blends with
// feathered masks and finishes to uint8.
//
// T frames, H and W height and width of the whole picture, C channels innermost. Pixels of a row are contiguous;
// strides count elements. Arithmetic is float32; results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace pusa {

enum class Element { float32, bfloat16, float16, uint8 };

// [T, height, width, C]; its pixel (0, 0) is pixel (top, left) of the picture.
struct Tile {
  const void* data;
  std::int64_t frame, row;  // strides of T and height
  std::int64_t top, left, height, width;
};

constexpr int kMostTiles = 64;

// out = sum of mask * tile / sum of masks over the tiles, in their order: the box [T, height, width, C] at (top, left)
// of the picture. Float results are clamped to [-1, 1] if `clamp`; uint8 results are levels of [-1, 1], rounded half to
// even if `round`, else truncated. A pixel of no tile is NaN, as uint8 0.
struct BlendBox {
  Tile tiles[kMostTiles];
  int count;
  Element type, out_type;  // of the tiles (not uint8), of the result
  bool clamp, round;
  void* out;
  std::int64_t frame, row;  // strides of out
  std::int64_t frames, top, left, height, width, channels;
  std::int64_t picture_height, picture_width, border_h, border_w;  // borders: lengths of the masks' ramps
};
static_assert(sizeof(BlendBox) <= 4096, "CUDA passes at most 4 KB of arguments");

// Sizes and memory are trusted: see vae_tiling_bindings.cpp.
void run(const BlendBox& args, int threads);

// Queued on `stream` (a cudaStream_t) and not waited for; the device is current during the call only. Throws
// std::runtime_error: a row of 2^31 or more elements, or CUDA's own error at the launch.
namespace cuda {
void run(const BlendBox& args, int device, void* stream);
}

// Row y of the box, frames first .. last. Implemented once per instruction set, in vae_tiling_rows.cpp. `columns`
// [count, width * C] are the tiles' weights across, one an element.
struct RowSpan {
  std::int64_t y, first, last;
};

namespace base {
void blend_row(const BlendBox& args, RowSpan span, const float* columns);
}
namespace avx2 {
void blend_row(const BlendBox& args, RowSpan span, const float* columns);
}
namespace avx512 {
void blend_row(const BlendBox& args, RowSpan span, const float* columns);
}

}  // namespace pusa
