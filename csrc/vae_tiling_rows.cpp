// Rows of pictures: tiles added to an accumulator, and its way to frames. Compiled once per instruction set; see
// row_math.hpp.
#include "row_math.hpp"
#include "vae_tiling.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

PUSA_INLINE float* picture_row(float* scratch, const Clip& clip, int index) {
  return scratch + index * scratch_stride(clip.width * clip.channels);
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

template <class Args>
PUSA_INLINE Vec finished(Vec v, const Args& a, const uint8_t*) {
  return level(v, a.round);
}

template <class Args, class T>
PUSA_INLINE Vec finished(Vec v, const Args& a, const T*) {
  return a.clamp ? clamped(v) : v;
}

// out = in / weight, or in where there is no weight: a row of elements.
template <class In, class Args, class Out>
PUSA_INLINE void finish_elements(const In* in, const float* weight, const Args& a, Out* out) {
  each(a.out.width * a.out.channels, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
    Vec v = read(in + i, lanes);
    if (weight) v = v / load(weight + i, lanes);
    store(out + i, finished(v, a, out), lanes);
  });
}

template <class In, class Out>
void finish(const FinishFrames& a, RowSpan span, float* scratch) {
  const int64_t C = a.acc.channels;
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
    finish_elements(in, weight, a, out);
    if (!direct) unpack(out, a.out, row);
  }
}

// sum / weight, given 1 / weight: corrected once, which rounds it as a division does. Infinity stays.
PUSA_INLINE Vec quotient(Vec sum, Vec weight, Vec inverse) {
#if defined(__FMA__)
  const Vec near = sum * inverse, exact = near + (sum - near * weight) * inverse;
  return exact == exact ? exact : near;
#else
  (void)inverse;
  return sum / weight;
#endif
}

// A term in one row: its values and its mask across from the segment's first element on, and its weight down.
template <class T>
struct RowTerm {
  const T* values;
  int64_t frame;  // stride to the next frame
  const float* mask;
  float down;
};

// F frames from t on share the masks.
template <int F, class T, class Out>
PUSA_INLINE void finish_segment(const FinishTiles& a, const Segment& segment, int64_t t, int64_t y, RowTerm<T>* terms,
                                Out* out) {
  static_assert(sizeof(RowTerm<T>) <= kTermFloats * sizeof(float), "a term has its room in the scratch memory");
  RowTerm<T>* const end = terms + segment.count;
  for (int64_t k = 0; k < segment.count; ++k) {
    const PlacedTile& tile = *segment.terms[k].tile;
    terms[k] = {at<T>(tile.clip, t, y - tile.top) + segment.terms[k].offset, tile.clip.frame, segment.terms[k].mask,
                ramp_at(y, tile.top, tile.clip.height, a.out.height, a.border_h)};
  }
  each(segment.last - segment.first, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
    Vec sum[F] = {}, weight{};
    for (const RowTerm<T>* term = terms; term < end; ++term) {
      const Vec across = load(term->mask + i, lanes), limit = broadcast(term->down);
      const Vec mask = across < limit ? across : limit;
      weight += mask;
      for (int f = 0; f < F; ++f) sum[f] += mask * load(term->values + f * term->frame + i, lanes);
    }
    const Vec inverse = 1.0f / weight;
    for (int f = 0; f < F; ++f) {
      store(out + f * a.out.frame + i, finished(quotient(sum[f], weight, inverse), a, out), lanes);
    }
  });
}

template <class T, class Out>
void finish_band(const FinishTiles& a, RowSpan span, float* scratch) {
  const Segment *first = a.segments + a.starts[span.y], *last = a.segments + a.starts[span.y + 1];
  Out* const room = reinterpret_cast<Out*>(picture_row(scratch, a.out, 0));
  auto* const terms = reinterpret_cast<RowTerm<T>*>(picture_row(scratch, a.out, kPictureRows));
  const bool direct = a.out.pixel == a.out.channels;
  for (int64_t y = first->top; y < first->bottom; ++y) {
    int64_t t = span.first;
    for (; direct && t + kBandFrames <= span.last; t += kBandFrames) {
      for (const Segment* segment = first; segment < last; ++segment) {
        finish_segment<kBandFrames>(a, *segment, t, y, terms, at<Out>(a.out, t, y) + segment->first);
      }
    }
    for (; t < span.last; ++t) {
      Out* const row = at<Out>(a.out, t, y);
      Out* const out = direct ? row : room;
      for (const Segment* segment = first; segment < last; ++segment) {
        finish_segment<1>(a, *segment, t, y, terms, out + segment->first);
      }
      if (!direct) unpack(out, a.out, row);
    }
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

void finish_tiles(const FinishTiles& a, RowSpan span, float* scratch) {
  with_element(a.type, [&](auto in) {
    if constexpr (sizeof(in) != 1) {
      with_element(a.out.type, [&](auto out) { finish_band<decltype(in), decltype(out)>(a, span, scratch); });
    }
  });
}

}  // namespace PUSA_ISA
}  // namespace pusa
