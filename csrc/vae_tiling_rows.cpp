// Rows of a box from the tiles that cover them. Compiled once per instruction set; see row_math.hpp.
#include "row_math.hpp"
#include "vae_tiling.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

// The part of a row that the same tiles cover; it ends before column `stop` of the picture.
struct Segment {
  int tiles[kMostTiles];
  int count;
  int64_t stop;
};

PUSA_INLINE Segment segment_from(const BlendBox& a, int64_t y, int64_t x) {
  Segment found{{}, 0, a.left + a.width};
  for (int n = 0; n < a.count; ++n) {
    const Tile& tile = a.tiles[n];
    const int64_t right = tile.left + tile.width;
    if (y < tile.top || y >= tile.top + tile.height || right <= x) continue;
    if (tile.left <= x) found.tiles[found.count++] = n;
    const int64_t edge = tile.left <= x ? right : tile.left;
    found.stop = edge < found.stop ? edge : found.stop;
  }
  return found;
}

template <class In, class Out>
void blend(const BlendBox& a, RowSpan span, const float* columns) {
  const int64_t C = a.channels, y = a.top + span.y, stride = a.width * C;
  Segment segment;
  for (int64_t x = a.left; x < a.left + a.width; x = segment.stop) {
    segment = segment_from(a, y, x);
    const In* values[kMostTiles];
    const float* across[kMostTiles];
    float down[kMostTiles];
    for (int k = 0; k < segment.count; ++k) {
      const Tile& tile = a.tiles[segment.tiles[k]];
      values[k] =
          static_cast<const In*>(tile.data) + span.first * tile.frame + (y - tile.top) * tile.row + (x - tile.left) * C;
      across[k] = columns + segment.tiles[k] * stride + (x - a.left) * C;
      down[k] = row_weight(a, tile, y);
    }
    for (int64_t t = span.first; t < span.last; ++t) {
      Out* const out = static_cast<Out*>(a.out) + t * a.frame + span.y * a.row + (x - a.left) * C;
      each((segment.stop - x) * C, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
        Vec sum = broadcast(-0.0f), weight{};  // adding to -0 keeps even -0
        for (int k = 0; k < segment.count; ++k) {
          const Vec column = load(across[k] + i, lanes), row = broadcast(down[k]);
          const Vec mask = column < row ? column : row;
          sum += mask * read(values[k] + i, lanes);
          weight += mask;
        }
        store(out + i, finished(sum / weight, a, out), lanes);
      });
      for (int k = 0; k < segment.count; ++k) values[k] += a.tiles[segment.tiles[k]].frame;
    }
  }
}

template <class Call>
PUSA_INLINE void with_element(Element type, Call call) {
  if (type == Element::float32) {
    call(float{});
  } else if (type == Element::bfloat16) {
    call(bf16{});
  } else if (type == Element::float16) {
    call(f16{});
  } else {
    call(uint8_t{});
  }
}

}  // namespace

void blend_row(const BlendBox& a, RowSpan span, const float* columns) {
  with_element(a.type, [&](auto in) {
    if constexpr (sizeof(in) != 1) {
      with_element(a.out_type, [&](auto out) { blend<decltype(in), decltype(out)>(a, span, columns); });
    }
  });
}

}  // namespace PUSA_ISA
}  // namespace pusa
