// Vectors of float32 in GNU C++'s vector extension (GCC, Clang), as wide as the instruction set of the file that
// includes this: sources here are compiled once per instruction set, in namespace PUSA_ISA.
//
// Everything has internal linkage, and no std:: function is used: an inline function compiled for AVX-512 must not be
// the copy that the linker keeps for the whole module.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "row_ops.hpp"

#ifndef PUSA_ISA
#error "define PUSA_ISA: base, avx2 or avx512"
#endif

#define PUSA_INLINE inline __attribute__((always_inline))
#define PUSA_LAMBDA __attribute__((always_inline))

namespace pusa {
namespace PUSA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#define PUSA_SWAPPED 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define PUSA_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define PUSA_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
constexpr int W = 8;
#define PUSA_SWAPPED 1, 0, 3, 2, 5, 4, 7, 6
#define PUSA_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define PUSA_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#else
constexpr int W = 4;
#define PUSA_SWAPPED 1, 0, 3, 2
#define PUSA_EVENS 0, 2, 4, 6
#define PUSA_ODDS 1, 3, 5, 7
#endif

using bf16 = uint16_t;
struct f16 {
  uint16_t bits;
};
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

// How many lanes of a step count: all, or the first `lanes` at the end of a row.
struct All {};
struct First {
  int lanes;
};

PUSA_INLINE Vec broadcast(float value) { return value - Vec{}; }

PUSA_INLINE Vec load(const float* p, All) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

PUSA_INLINE Vec load(const bf16* p, All) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  const Bits bits = (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);  // unmasked, GCC warns in its own header
#elif defined(__AVX2__)
  const Bits bits = (Bits)_mm256_cvtepu16_epi32((__m128i)h);
#else
  const Bits bits = __builtin_convertvector(h, Bits);
#endif
  return (Vec)(bits << 16);
}

PUSA_INLINE void store(float* p, Vec v, All) { __builtin_memcpy(p, &v, sizeof v); }

// The bf16 nearest to v, ties to even, in the lower half. A NaN keeps its upper half, which leaves it one: out of
// arithmetic, as v is, it is quiet.
PUSA_INLINE Bits rounded(Vec v) {
  const Bits bits = (Bits)v;
  return (v == v ? bits + (0x7fffu + ((bits >> 16) & 1u)) : bits) >> 16;
}

PUSA_INLINE void store(bf16* p, Vec v, All) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded(v));
#else
  const Halves halves = __builtin_convertvector(rounded(v), Halves);
#endif
  __builtin_memcpy(p, &halves, sizeof halves);
}

// IEEE half precision. F16C, an extension of its own, is not asked for: AVX-512F holds its instructions, others do
// without.
PUSA_INLINE Vec load(const f16* p, All) {
#if defined(__AVX512F__)
  __m256i halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, halves);
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  const Bits wide = __builtin_convertvector(h, Bits), rest = (wide & 0x7fffu) << 13;
  // The exponents' biases differ by 112; exact for subnormals too. All ones stay all ones: infinity and NaN.
  const Bits finite = (Bits)((Vec)rest * 0x1p112f);
  const Bits magnitude = rest >= 0x0f800000u ? rest | 0x7f800000u : finite;
  return (Vec)(magnitude | ((wide & 0x8000u) << 16));
#endif
}

// To nearest even.
PUSA_INLINE void store(f16* p, Vec v, All) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Bits bits = (Bits)v, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the addition of 1/2 rounds to the spacing of subnormals.
  const Bits small = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits infinite{}, nan = infinite + 0x7e00u;
  const Bits large = magnitude > 0x7f800000u ? nan : infinite + 0x7c00u;
  const Bits found = magnitude >= 0x47800000u ? large : (magnitude < 0x38800000u ? small : normal);
  const Halves halves = __builtin_convertvector(found | ((bits >> 16) & 0x8000u), Halves);
#endif
  __builtin_memcpy(p, &halves, sizeof halves);
}

// Values of 0 to 255; the fraction goes.
PUSA_INLINE void store(uint8_t* p, Vec v, All) {
  const Ints ints = __builtin_convertvector(v, Ints);
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)ints);
#elif defined(__SSE2__)  // by hand, since GCC takes the lanes one by one
#if defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)ints), high = _mm256_extracti128_si256((__m256i)ints, 1);
#else
  const __m128i low = (__m128i)ints, high = low;
#endif
  const __m128i words = _mm_packs_epi32(low, high), packed = _mm_packus_epi16(words, words);
  uint8_t bytes[W];
  __builtin_memcpy(bytes, &packed, sizeof bytes);
#else
  const Bytes bytes = __builtin_convertvector(ints, Bytes);
#endif
  __builtin_memcpy(p, &bytes, sizeof bytes);
}

#if defined(__AVX512F__)
PUSA_INLINE __mmask16 mask_of(First some) { return static_cast<__mmask16>((1u << some.lanes) - 1); }

PUSA_INLINE Vec load(const float* p, First some) { return (Vec)_mm512_maskz_loadu_ps(mask_of(some), p); }

PUSA_INLINE void store(float* p, Vec v, First some) { _mm512_mask_storeu_ps(p, mask_of(some), (__m512)v); }

PUSA_INLINE Vec load(const bf16* p, First some) {
  const __m512i row = _mm512_maskz_loadu_epi16(mask_of(some), p);
  __m256i halves;  // GCC warns in its own header of the cast to it
  __builtin_memcpy(&halves, &row, sizeof halves);
  return (Vec)((Bits)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
}

PUSA_INLINE void store(bf16* p, Vec v, First some) {
  _mm512_mask_cvtepi32_storeu_epi16(p, mask_of(some), (__m512i)rounded(v));
}
#endif

template <class T>
PUSA_INLINE Vec load(const T* p, First some) {  // zeros after the end
  T row[W] = {};
  for (int i = 0; i < some.lanes; ++i) row[i] = p[i];
  return load(row, All{});
}

template <class T>
PUSA_INLINE void store(T* p, Vec v, First some) {
  T row[W];
  store(row, v, All{});
  for (int i = 0; i < some.lanes; ++i) p[i] = row[i];
}

PUSA_INLINE Vec keep(Vec v, All) { return v; }

PUSA_INLINE Vec keep(Vec v, First some) {
  for (int i = 0; i < W; ++i) v[i] = i < some.lanes ? v[i] : 0.0f;
  return v;
}

PUSA_INLINE Vec swap_pairs(Vec v) {  // (0, 1, 2, 3, ..) -> (1, 0, 3, 2, ..)
#if defined(__clang__)
  return __builtin_shufflevector(v, v, PUSA_SWAPPED);
#else
  return __builtin_shuffle(v, Ints{PUSA_SWAPPED});
#endif
}

PUSA_INLINE float sum(Vec v) {
  float lane[W];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// The first reading of a tensor and the writing of a result ask for the memory 2 KB further on, mostly the same row or
// the next: the processor's own prefetching leaves up to half of the bandwidth unused. Past the end this does nothing.
constexpr int kAhead = 2048;

template <class T, class Lanes>
PUSA_INLINE Vec read(const T* p, Lanes lanes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead));
  return load(p, lanes);
}

template <class T, class Lanes>
PUSA_INLINE void write(T* p, Vec v, Lanes lanes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead), 1);
  store(p, v, lanes);
}

// A sum over a row in four independent chains, so that additions do not wait for each other.
struct Sum {
  Vec chain[4] = {};
  PUSA_INLINE float total() const { return sum((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// body(i, lanes, chain) for i = 0, W, 2 W, ..; `lanes` is All, and First at the end of a width that is no multiple of
// W.
template <class Body>
PUSA_INLINE void each(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    body(i, All{}, 0);
    body(i + W, All{}, 1);
    body(i + 2 * W, All{}, 2);
    body(i + 3 * W, All{}, 3);
  }
  for (; i + W <= width; i += W) body(i, All{}, 0);
  if (i < width) body(i, First{static_cast<int>(width - i)}, 1);
}

PUSA_INLINE float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// 2^f for f in [-1/2, 1/2]: the minimax polynomial of relative error (1.9e-9).
PUSA_INLINE Vec exp2_fraction(Vec f) {
  Vec p = broadcast(1.53458121613e-4f);
  p = p * f + 1.33999311772e-3f;
  p = p * f + 9.61848895633e-3f;
  p = p * f + 5.55032877711e-2f;
  p = p * f + 2.40226468906e-1f;
  p = p * f + 6.93147205737e-1f;
  return p * f + 1.00000000055f;
}

// 2^t for t in [-126, 126]: within 1 ulp.
PUSA_INLINE Vec exp2_bounded(Vec t) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the addition rounds t to an integer in the low bits
  const Vec shifted = t + magic;
  const Vec p = exp2_fraction(t - (shifted - magic));
  return (Vec)((Bits)p + ((Bits)shifted << 23));  // of magic's own bits the shift leaves none
}

template <class T>
PUSA_INLINE T* row(const Rows& rows, int64_t batch, int64_t token) {
  return static_cast<T*>(rows.data) + batch * rows.batch + token * rows.token;
}

// Where the sums over a span go, cleared. null: unwanted.
PUSA_INLINE float* cleared(const RowSums& sums, int64_t width, Span span) {
  if (!sums.data) return nullptr;
  float* partial = sums.partial + span.block * width;
  __builtin_memset(partial, 0, static_cast<size_t>(width) * sizeof(float));
  return partial;
}

// call(T{}) with the storage type of `type`.
template <class Call>
PUSA_INLINE void with_type(Type type, Call call) {
  if (type == Type::float32) {
    call(float{});
  } else {
    call(bf16{});
  }
}

// A table's rows in float32, one at a time: the row itself where it is stored so, else made in `room` (D floats) when
// another is asked for.
class FrameRow {
 public:
  FrameRow(const Table& table, int64_t width, float* room) : table_(table), width_(width), room_(room) {}

  PUSA_INLINE const float* at(int64_t batch, int64_t frame) {  // null: no table
    const int64_t offset = batch * table_.batch + frame * table_.step;
    if (offset != offset_) move_to(offset);
    return row_;
  }

 private:
  void move_to(int64_t offset) {
    offset_ = offset;
    if (!table_.data) return;
    if (table_.type == Type::float32) {
      row_ = static_cast<const float*>(table_.data) + offset;
      return;
    }
    const bf16* source = static_cast<const bf16*>(table_.data) + offset;
    each(width_, [&](int64_t i, auto lanes, int) PUSA_LAMBDA { store(room_ + i, load(source + i, lanes), lanes); });
    row_ = room_;
  }

  Table table_;
  int64_t width_;
  float* room_;
  const float* row_ = nullptr;
  int64_t offset_ = INT64_MIN;
};

// body(row, b, t, f) for the rows of a span: row counts tokens over the batch, t is the token of sequence b, f its
// frame.
template <class Body>
PUSA_INLINE void each_token(const Size& size, const Frames& frames, Span span, Body body) {
  if (span.first >= span.last) return;
  int64_t b = span.first / size.tokens, t = span.first % size.tokens, f = (frames.first + t) / frames.tokens;
  int64_t f_end = (f + 1) * frames.tokens - frames.first;  // the token that begins the next frame
  for (int64_t row = span.first; row < span.last; ++row, ++t) {
    if (t == size.tokens) {
      t = 0;
      ++b;
      f = frames.first / frames.tokens;
      f_end = (f + 1) * frames.tokens - frames.first;
    } else if (t == f_end) {
      ++f;
      f_end += frames.tokens;
    }
    body(row, b, t, f);
  }
}

// Row `index` of the scratch memory.
PUSA_INLINE float* scratch_row(float* scratch, int64_t width, int index) { return scratch + index * (width + 64); }

}  // namespace
}  // namespace PUSA_ISA
}  // namespace pusa
