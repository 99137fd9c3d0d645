// What happens to one element when tiles are blended: the same source for the CPU, where Value is a vector of float32,
// and for CUDA, where it is a float. The formulas are those of pusa_fast/ops/tiles.py.
//
// Everything has internal linkage, since sources are compiled once per instruction set: see row_math.hpp.
#pragma once

#include <stdint.h>

#include "vae_tiling.hpp"

#if defined(__CUDACC__)
#define PUSA_BOTH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PUSA_BOTH inline __attribute__((always_inline))
#else
#define PUSA_BOTH inline
#endif

namespace pusa {
namespace {

template <class Value>
PUSA_BOTH Value constant(float x) {
  return x - Value{};  // keeps -0
}

// Weight of position i of a tile of `size` along one axis: a ramp of `border` at each end inside the picture. Where the
// ramps overlap, the one at the far end wins.
PUSA_BOTH float ramp(int64_t i, int64_t size, int64_t border, bool inside_before, bool inside_after) {
  const int64_t left = size - i;
  if (inside_after && left <= border) return static_cast<float>(left) / static_cast<float>(border);
  if (inside_before && i < border) return static_cast<float>(i + 1) / static_cast<float>(border);
  return 1.0f;
}

PUSA_BOTH float row_weight(const BlendBox& a, const Tile& tile, int64_t y) {
  return ramp(y - tile.top, tile.height, a.border_h, tile.top > 0, tile.top < a.picture_height - tile.height);
}

PUSA_BOTH float column_weight(const BlendBox& a, const Tile& tile, int64_t x) {
  return ramp(x - tile.left, tile.width, a.border_w, tile.left > 0, tile.left < a.picture_width - tile.width);
}

PUSA_BOTH float smaller(float a, float b) { return a < b ? a : b; }

// A level of 0 .. 255 of a value of -1 .. 1; the store drops the fraction. NaN is level 0.
template <class Value>
PUSA_BOTH Value finished(Value v, const BlendBox& a, const uint8_t*) {
  const Value low = constant<Value>(0.0f), high = constant<Value>(255.0f);
  Value x = (v + 1.0f) * 127.5f;
  x = x > low ? x : low;
  x = x < high ? x : high;
  constexpr float kNoFraction = 8388608.0f;  // 2^23: floats from here on are whole
  return a.round ? (x + kNoFraction) - kNoFraction : x;
}

// A value for a float type. NaN stays.
template <class Value, class Out>
PUSA_BOTH Value finished(Value v, const BlendBox& a, const Out*) {
  const Value low = constant<Value>(-1.0f), high = constant<Value>(1.0f);
  if (!a.clamp) return v;
  v = v < low ? low : v;
  return v > high ? high : v;
}

}  // namespace
}  // namespace pusa
