// The VAE's step between two convolutions: bias, residual, RMS norm over channels, SiLU. Compiled once per instruction set;
// see row_math.hpp.
//
// Its arithmetic costs as much as its memory does, and for bf16 much of that goes to conversions. So two vectors of bf16
// are taken from one load, the even elements and the odd ones: one instruction for each to widen, and two for both to pack.
// What meets them, tables and the sums in `scratch`, is kept in that order.
#include "row_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

// 2 W channels at once, in the order of `load`: for float32 as they come, for bf16 the even ones, then the odd ones.
struct Both {};
struct Two {
  Vec a, b;
};

PUSA_INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
PUSA_INLINE Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
PUSA_INLINE Two operator*(Two x, Vec y) { return {x.a * y, x.b * y}; }

PUSA_INLINE Two load(const float* p, Both) { return {load(p, All{}), load(p + W, All{})}; }
PUSA_INLINE void store(float* p, Two v, Both) {
  store(p, v.a, All{});
  store(p + W, v.b, All{});
}

PUSA_INLINE Two load(const bf16* p, Both) {
  Bits pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
}

// To nearest even. Other than `rounded` it may make a number of a NaN whose lower half is not zero. None comes here: those
// of bf16 and of arithmetic have zeros there, and the tables are cleared of others.
PUSA_INLINE void store(bf16* p, Two v, Both) {
  const Bits even = ((Bits)v.a + (0x7fffu + (((Bits)v.a >> 16) & 1u))) >> 16;
  const Bits odd = (Bits)v.b + (0x7fffu + (((Bits)v.b >> 16) & 1u));
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, (__m512i)odd);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  const Bits pairs = (odd & 0xffff0000u) | even;
#endif
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

PUSA_INLINE void add_squares(Vec (&chain)[2], Two v) {
  chain[0] += v.a * v.a;
  chain[1] += v.b * v.b;
}
PUSA_INLINE void add_squares(Vec (&chain)[2], Vec v) { chain[0] += v * v; }

// body(i, lanes), `lanes` Both as long as there are as many channels, then All and First.
template <class Body>
PUSA_INLINE void each_two(int64_t channels, Body body) {
  int64_t i = 0;
  for (; i + 2 * W <= channels; i += 2 * W) body(i, Both{});
  if (i + W <= channels) {
    body(i, All{});
    i += W;
  }
  if (i < channels) body(i, First{static_cast<int>(channels - i)});
}

PUSA_INLINE float total(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

// sigma(v) = 1 / (1 + 2^t), t = -v log2(e), for a result in T. float32: within a few ulp. bf16: within 2^-12.6, a tenth of
// what rounding adds; 2^t by the minimax polynomial of degree 3 (relative error 2^-13.7), 1 / x to 14 bits.
template <class T>
PUSA_INLINE Vec sigmoid(Vec v) {
  constexpr bool kShort = sizeof(T) == 2;
  Vec t = v * -1.44269504089f;
#if defined(__AVX512F__)
  if constexpr (!kShort) t = (Vec)_mm512_maskz_min_ps(0xffff, (__m512)t, _mm512_set1_ps(126.0f));  // Newton's step has no 1 / inf
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEAREST_INT);
  const Vec f = t - (Vec)whole;
  Vec p;
  if constexpr (kShort) {
    p = ((5.51716695414e-2f * f + 2.42611125438e-1f) * f + 6.93260985653e-1f) * f + 9.99928073346e-1f;
  } else {
    p = exp2_fraction(f);
  }
  const Vec d = 1.0f + (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, whole);
  const Vec q = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  if constexpr (kShort) return q;
  return q + q * (1.0f - d * q);
#else
  const Vec low = broadcast(-126.0f), high = broadcast(126.0f);
  return 1.0f / (1.0f + exp2_bounded(t < low ? low : (t > high ? high : t)));
#endif
}

template <class T>
PUSA_INLINE Vec silu(Vec v) {
  return v * sigmoid<T>(v);
}
template <class T>
PUSA_INLINE Two silu(Two v) {
  return {v.a * sigmoid<T>(v.a), v.b * sigmoid<T>(v.b)};
}

template <class T>
PUSA_INLINE void ahead(T* p, int write) {
  const void* further = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead);
  write ? __builtin_prefetch(further, 1) : __builtin_prefetch(further);
}

// `table` * factor in the order of `load` of T, or `neutral` everywhere where it is absent.
template <class T>
float* row_in_order(const Table& table, int64_t channels, float factor, float neutral, float* room) {
  const auto value = [&](int64_t i) {
    if (!table.base) return neutral;
    float v = 0.0f;
    with_type(table.base_type, [&](auto type) {
      v = factor * load(static_cast<const decltype(type)*>(table.base) + i, First{1})[0];
    });
    return v == v ? v : __builtin_nanf("");
  };
  constexpr bool kPairs = sizeof(T) == 2;
  const int64_t paired = kPairs ? channels / (2 * W) * (2 * W) : 0;
  for (int64_t i = 0; i < channels; ++i) {
    const int64_t k = i % (2 * W);
    room[i < paired ? i - k + k / 2 + k % 2 * W : i] = value(i);
  }
  return room;
}

// The pixels of one span, a run of them along W at a time.
struct Run {
  int64_t b, t, h, w, count;
};

template <class Body>
PUSA_INLINE void each_run(const VaeAct& a, Span span, Body body) {
  for (int64_t i = span.first; i < span.last;) {
    const int64_t row = i / a.size[3], w = i % a.size[3];
    const int64_t left = a.size[3] - w, count = left < span.last - i ? left : span.last - i;
    body(Run{row / a.size[2] / a.size[1], row / a.size[2] % a.size[1], row % a.size[2], w, count});
    i += count;
  }
}

template <class T>
PUSA_INLINE T* start(const Pixels& p, const Run& run) {
  return static_cast<T*>(p.data) + run.b * p.stride[0] + run.t * p.stride[1] + run.h * p.stride[2] + run.w * p.stride[3];
}

// Where y has the first channel of pixel w of a run's row.
template <class T>
struct Source {
  const T* row;
  int64_t step, channels;
  bool upsampled;

  PUSA_INLINE Source(const VaeAct& a, const Run& run)
      : step(a.y.stride[3]), channels(a.channels), upsampled(a.upsampled) {
    const int64_t lower = run.h & 1, h = upsampled ? (run.h >> 1) + lower : run.h;
    row = start<T>(a.y, Run{run.b, run.t, h, 0, 0}) + (upsampled ? 2 * lower * channels : 0);
  }
  PUSA_INLINE const T* at(int64_t w) const {
    return upsampled ? row + ((w >> 1) + (w & 1)) * step + (w & 1) * channels : row + w * step;
  }
};

template <class T, bool kSilu, class Lanes>
PUSA_INLINE void finish(const float* s, const float* gamma, T* out, int64_t i, Vec factor, Lanes lanes) {
  const auto n = load(s + i, lanes) * factor * load(gamma + i, lanes);
  ahead(out + i, 1);
  if constexpr (kSilu) {
    store(out + i, silu<T>(n), lanes);
  } else {
    store(out + i, n, lanes);
  }
}

// A pixel's sum is kept in float32 in `scratch`, the nearest cache, between the norm and the activation.
template <class T, bool kX, bool kR, bool kOut>
void act(const VaeAct& a, Span span, float* scratch) {
  const int64_t C = a.channels;
  const float* bias = row_in_order<T>(a.bias, C, 1.0f, -0.0f, scratch_row(scratch, C, 1));  // s + -0.0 is s, -0.0 too
  const float* gamma = row_in_order<T>(a.gamma, C, sqrtf(static_cast<float>(C)), 0.0f, scratch_row(scratch, C, 2));
  each_run(a, span, [&](const Run& run) PUSA_LAMBDA {
    const Source<T> source(a, run);
    const T* x = kX ? start<T>(a.x, run) : nullptr;
    T* r = kR ? start<T>(a.r, run) : nullptr;
    T* out = kOut ? start<T>(a.out, run) : nullptr;
    for (int64_t w = run.w; w < run.w + run.count; ++w) {
      const T* y = source.at(w);
      Vec squares[2] = {};
      each_two(C, [&](int64_t i, auto lanes) PUSA_LAMBDA {
        ahead(y + i, 0);
        auto s = load(y + i, lanes) + load(bias + i, lanes);
        if constexpr (kX) {
          ahead(x + i, 0);
          s = s + load(x + i, lanes);
        }
        if constexpr (kR) {
          ahead(r + i, 1);
          store(r + i, s, lanes);
        }
        if constexpr (kOut) {
          store(scratch + i, s, lanes);
          add_squares(squares, s);
        }
      });
      if constexpr (kOut) {
        const float norm = sqrtf(total(squares[0] + squares[1]));
        const Vec factor = broadcast(1.0f / (norm < 1e-12f ? 1e-12f : norm));
        if (a.silu) {
          each_two(C, [&](int64_t i, auto lanes) PUSA_LAMBDA { finish<T, true>(scratch, gamma, out, i, factor, lanes); });
        } else {
          each_two(C, [&](int64_t i, auto lanes) PUSA_LAMBDA { finish<T, false>(scratch, gamma, out, i, factor, lanes); });
        }
        out += a.out.stride[3];
      }
      if constexpr (kX) x += a.x.stride[3];
      if constexpr (kR) r += a.r.stride[3];
    }
  });
}

template <class T, bool kX>
void choose(const VaeAct& a, Span span, float* scratch) {
  if (!a.out.data) return act<T, kX, true, false>(a, span, scratch);
  if (a.r.data) return act<T, kX, true, true>(a, span, scratch);
  act<T, kX, false, true>(a, span, scratch);
}

}  // namespace

void vae_act(const VaeAct& args, Span span, float* scratch) {
  with_type(args.type, [&](auto type) {
    using T = decltype(type);
    args.x.data ? choose<T, true>(args, span, scratch) : choose<T, false>(args, span, scratch);
  });
}

}  // namespace PUSA_ISA
}  // namespace pusa
