// Spatial tiling of the VAE: the plan, gathering tiles, blending them with feathered masks, and one last pass to
// frames.
//
// T frames, H and W height and width, C channels innermost; N tiles of th x tw. Strides count elements. Arithmetic is
// float32; results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace pusa {

enum class Element { float32, bfloat16, float16, uint8 };

// [T, H, W, C] with a unit stride in C.
struct Clip {
  void* data;
  Element type;
  std::int64_t frames, height, width, channels;
  std::int64_t frame, row, pixel;  // strides of T, H, W
};

// tiles[n] is N tiles' n-th, of tile.frames x tile.height x tile.width x tile.channels, at (tops[n], lefts[n]) of a
// picture.
struct TileBatch {
  Clip tile;          // the first
  std::int64_t step;  // stride of N
  std::int64_t count;
  const std::int64_t* tops;
  const std::int64_t* lefts;
};

// tiles[n] = the area of `source` that it covers. Only sizes of elements matter.
struct GatherTiles {
  TileBatch batch;
  Clip source;
  std::int64_t itemsize;
};

// acc += mask * tile and weight += mask, in the order of the tiles. Where weight is 0 acc is not read: it may be memory
// that nothing was written to. acc and tiles have their pixels side by side; acc [T, H, W, C] is float32, weight [H, W]
// contiguous.
struct BlendTiles {
  TileBatch batch;
  Clip acc;
  float* weight;
  std::int64_t border_h, border_w;
};

// out = acc / weight (weight null: acc) as levels of 0 .. 255 (uint8), truncated unless `round`; or in a float type,
// confined to [-1, 1] if `clamp`.
struct FinishFrames {
  Clip acc, out;
  const float* weight;
  bool clamp, round;
};

// The two above in one, without memory for the sums: out = sum of mask * tile / sum of mask, of tiles that lie
// anywhere, each of its own size. Pixels of no tile are NaN, as uint8 0.
struct PlacedTile {
  Clip clip;
  std::int64_t top, left;
};

// A tile in a segment: its own elements there begin at `offset` of a row, those of its mask across at `mask`.
struct Term {
  const PlacedTile* tile;
  const float* mask;
  std::int64_t offset;
};

// Elements first .. last of rows top .. bottom, which the same tiles cover: `count` terms from `terms` on.
struct Segment {
  std::int64_t top, bottom, first, last;
  const Term* terms;
  std::int64_t count;
};

struct FinishTiles {
  Clip out;
  Element type;  // of all tiles
  std::int64_t border_h;
  bool clamp, round;
  const Segment* segments;     // band by band: those of the same rows stand together, from left to right
  const std::int64_t* starts;  // of each band's segments, and their end
};

struct TileSpan {
  std::int64_t top, bottom, left, right;
};

// Starts are multiples of the stride; none is in the plan whose tile would lie wholly inside the one before. The last
// tile may be smaller. Throws std::invalid_argument: sizes below 1, a stride larger than its tile, more than 2^20
// tiles.
std::vector<TileSpan> tile_plan(std::int64_t height, std::int64_t width, std::int64_t tile_h, std::int64_t tile_w,
                                std::int64_t stride_h, std::int64_t stride_w);

// On the CPU.
void run(const GatherTiles& args, int threads);
void run(const BlendTiles& args, int threads);
void run(const FinishFrames& args, int threads);
void run(const std::vector<PlacedTile>& tiles, std::int64_t border_h, std::int64_t border_w, const Clip& out,
         bool clamp, bool round, int threads);

// On a CUDA device, which is current during the call only: queued on `stream` (a cudaStream_t), not waited for. Throws
// std::runtime_error with CUDA's words where a launch fails.
namespace cuda {
void run(const GatherTiles& args, int device, void* stream);
void run(const BlendTiles& args, int device, void* stream);
void run(const FinishFrames& args, int device, void* stream);
}  // namespace cuda

// What follows is implemented once per instruction set, in vae_tiling_rows.cpp: row (or band) y of frames first ..
// last. `scratch` holds kPictureRows rows of scratch_stride(W * C) floats, finish_tiles' also kTermFloats for each term
// of a segment.
struct RowSpan {
  std::int64_t y, first, last;
};

constexpr int kPictureRows = 3;
constexpr std::int64_t kTermFloats = 8;
constexpr int kBandFrames = 4;  // of a band, at a time

#define PUSA_PICTURE_KERNELS(DO) \
  DO(blend_row, BlendTiles)      \
  DO(finish_row, FinishFrames)   \
  DO(finish_tiles, FinishTiles)

#define PUSA_DECLARE(name, Args) void name(const Args& args, RowSpan span, float* scratch);
namespace base {
PUSA_PICTURE_KERNELS(PUSA_DECLARE)
}
namespace avx2 {
PUSA_PICTURE_KERNELS(PUSA_DECLARE)
}
namespace avx512 {
PUSA_PICTURE_KERNELS(PUSA_DECLARE)
}
#undef PUSA_DECLARE

}  // namespace pusa
