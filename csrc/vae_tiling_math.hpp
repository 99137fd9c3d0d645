// What happens to one element when tiles are blended and frames finished: the same lines for the CPU, where Value is a
// vector of float32, and for CUDA, where it is a float. The formulas are those of pusa_fast/model/blending.py.
//
// Everything has internal linkage, since sources are compiled once per instruction set: see row_math.hpp.
#pragma once

#include <stdint.h>

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
  return Value{} + x;
}

// Weight of position i of a tile of `size` along one axis: a ramp of `border` at each end inside the picture. Where
// both reach, the one at the far end stands.
PUSA_BOTH float ramp(int64_t i, int64_t size, int64_t border, bool inside_before, bool inside_after) {
  const int64_t left = size - i;
  if (inside_after && left <= border) return static_cast<float>(left) / static_cast<float>(border);
  if (inside_before && i < border) return static_cast<float>(i + 1) / static_cast<float>(border);
  return 1.0f;
}

// The same for the tile at `start` of an axis of `length`.
PUSA_BOTH float ramp_at(int64_t position, int64_t start, int64_t size, int64_t length, int64_t border) {
  return ramp(position - start, size, border, start > 0, start < length - size);
}

// Floats between the rows of a kernel's scratch memory, so that each begins where vectors do.
PUSA_BOTH int64_t scratch_stride(int64_t elements) { return (elements + 79) / 16 * 16; }

PUSA_BOTH float smaller(float a, float b) { return a < b ? a : b; }

// Level of 0 .. 255 of a value of -1 .. 1, its fraction kept for the store to drop unless `round`ed away, half to even.
// NaN is level 0.
template <class Value>
PUSA_BOTH Value level(Value v, bool round) {
  const Value low = constant<Value>(0.0f), high = constant<Value>(255.0f);
  Value x = (v + 1.0f) * 127.5f;
  x = x > low ? x : low;
  x = x < high ? x : high;
  constexpr float kNoFraction = 8388608.0f;  // 2^23: floats from here on are whole
  return round ? (x + kNoFraction) - kNoFraction : x;
}

// NaN stays.
template <class Value>
PUSA_BOTH Value clamped(Value v) {
  const Value low = constant<Value>(-1.0f), high = constant<Value>(1.0f);
  v = v < low ? low : v;
  return v > high ? high : v;
}

}  // namespace
}  // namespace pusa
