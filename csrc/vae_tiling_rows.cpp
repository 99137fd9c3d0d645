// Rows of pictures: tiles added to an accumulator, and its way to frames. Compiled once per instruction set; see row_math.hpp.
#include "row_math.hpp"
#include "vae_tiling.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

PUSA_INLINE float* picture_row(float* scratch, const Clip& clip, int index) {
  return scratch + index * (clip.width * clip.channels + kScratchPad);
}

template <class T>
PUSA_INLINE T* at(const Clip& clip, int64_t frame, int64_t y) {
  return static_cast<T*>(clip.data) + frame * clip.frame + y * clip.row;
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

// The pixels first .. last of tile n, all of them new to the accumulator (`fresh`) or none. `mask` is per element.
template <class T>
void add_run(const BlendTiles& a, RowSpan span, int64_t n, int64_t first, int64_t last, bool fresh, const float* mask) {
  const int64_t top = a.batch.tops[n], left = a.batch.lefts[n], C = a.acc.channels;
  for (int64_t t = span.first; t < span.last; ++t) {
    float* acc = at<float>(a.acc, t, span.y) + first * C;
    const T* tile = at<T>(a.batch.tile, t, span.y - top) + n * a.batch.step + (first - left) * C;
    if (fresh) {
      each((last - first) * C, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
        store(acc + i, load(mask + i, lanes) * read(tile + i, lanes), lanes);
      });
    } else {
      each((last - first) * C, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
        write(acc + i, load(acc + i, lanes) + load(mask + i, lanes) * read(tile + i, lanes), lanes);
      });
    }
  }
}

template <class T>
void blend(const BlendTiles& a, RowSpan span, float* scratch) {
  const Clip& tile = a.batch.tile;
  const int64_t C = a.acc.channels;
  // The weights of the row as they grow from tile to tile; those in memory change when all frames are done.
  float* weight = picture_row(scratch, a.acc, 0);
  float* mask = picture_row(scratch, a.acc, 1);
  __builtin_memcpy(weight, a.weight + span.y * a.acc.width, static_cast<size_t>(a.acc.width) * sizeof(float));
  for (int64_t n = 0; n < a.batch.count; ++n) {
    const int64_t top = a.batch.tops[n], left = a.batch.lefts[n], right = left + tile.width;
    if (span.y < top || span.y >= top + tile.height) continue;
    const float row = ramp_at(span.y, top, tile.height, a.acc.height, a.border_h);
    for (int64_t x = left; x < right;) {
      const int64_t first = x;
      const bool fresh = weight[x] == 0.0f;
      for (; x < right && (weight[x] == 0.0f) == fresh; ++x) {
        const float m = smaller(row, ramp_at(x, left, tile.width, a.acc.width, a.border_w));
        for (int64_t c = 0; c < C; ++c) mask[(x - first) * C + c] = m;
        weight[x] += m;
      }
      add_run<T>(a, span, n, first, x, fresh, mask);
    }
  }
}

// A row as it lies in memory where its pixels are side by side, else by way of `room`.
template <class T>
PUSA_INLINE const T* packed(const T* row, const Clip& clip, T* room) {
  if (clip.pixel == clip.channels) return row;
  for (int64_t x = 0; x < clip.width; ++x) {
    for (int64_t c = 0; c < clip.channels; ++c) room[x * clip.channels + c] = row[x * clip.pixel + c];
  }
  return room;
}

template <class T>
PUSA_INLINE void unpack(const T* room, const Clip& clip, T* row) {
  for (int64_t x = 0; x < clip.width; ++x) {
    for (int64_t c = 0; c < clip.channels; ++c) row[x * clip.pixel + c] = room[x * clip.channels + c];
  }
}

PUSA_INLINE Vec finished(Vec v, const FinishFrames& a, const uint8_t*) { return level(v, a.round); }

template <class T>
PUSA_INLINE Vec finished(Vec v, const FinishFrames& a, const T*) {
  return a.clamp ? clamped(v) : v;
}

template <class In, class Out>
void finish(const FinishFrames& a, RowSpan span, float* scratch) {
  const int64_t C = a.acc.channels, elements = a.acc.width * C;
  float* weight = a.weight ? picture_row(scratch, a.acc, 0) : nullptr;
  In* in_room = reinterpret_cast<In*>(picture_row(scratch, a.acc, 1));
  Out* out_room = reinterpret_cast<Out*>(picture_row(scratch, a.acc, 2));
  for (int64_t x = 0; weight && x < a.acc.width; ++x) {
    for (int64_t c = 0; c < C; ++c) weight[x * C + c] = a.weight[span.y * a.acc.width + x];
  }
  const bool direct = a.out.pixel == C;
  for (int64_t t = span.first; t < span.last; ++t) {
    const In* in = packed(at<const In>(a.acc, t, span.y), a.acc, in_room);
    Out* row = at<Out>(a.out, t, span.y);
    Out* out = direct ? row : out_room;
    each(elements, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      Vec v = read(in + i, lanes);
      if (weight) v = v / load(weight + i, lanes);
      store(out + i, finished(v, a, out), lanes);
    });
    if (!direct) unpack(out, a.out, row);
  }
}

}  // namespace

void blend_row(const BlendTiles& a, RowSpan span, float* scratch) {
  with_element(a.batch.tile.type, [&](auto type) {
    if constexpr (sizeof(type) != 1) blend<decltype(type)>(a, span, scratch);
  });
}

void finish_row(const FinishFrames& a, RowSpan span, float* scratch) {
  with_element(a.acc.type, [&](auto in) {
    if constexpr (sizeof(in) != 1) {
      with_element(a.out.type, [&](auto out) { finish<decltype(in), decltype(out)>(a, span, scratch); });
    }
  });
}

}  // namespace PUSA_ISA
}  // namespace pusa
