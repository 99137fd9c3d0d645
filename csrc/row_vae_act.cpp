// The VAE's step between two convolutions: bias, residual, RMS norm over channels, SiLU. Compiled once per instruction
// set; see row_math.hpp.
//
// Its arithmetic costs as much as its memory does, and for bf16 much of that goes to conversions. So two vectors of
// bf16 are taken from one load, the even elements and the odd ones: one instruction for each to widen, and two for both
// to pack. What meets them, tables and the sums in `scratch`, is kept in that order.
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

// Two vectors of float32 whose upper halves are bf16, to one.
PUSA_INLINE void pack(bf16* p, Bits even, Bits odd) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(even >> 16), (__m512i)odd);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  const Bits pairs = (odd & 0xffff0000u) | (even >> 16);
#endif
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

// To nearest even. Other than `rounded` it may make a number of a NaN whose lower half is not zero. None comes here:
// those of bf16 and of arithmetic have zeros there, and the tables are cleared of others.
PUSA_INLINE void store(bf16* p, Two v, Both) {
  const auto nearest = [](Bits bits) PUSA_LAMBDA { return bits + (0x7fffu + ((bits >> 16) & 1u)); };
  pack(p, nearest((Bits)v.a), nearest((Bits)v.b));
}

// A result that was approximated: to nearest, and where two are equally near to the larger one. In a third of the time.
template <class V, class Lanes>
PUSA_INLINE void store_approximate(float* p, V v, Lanes lanes) {
  store(p, v, lanes);
}
template <class Lanes>
PUSA_INLINE void store_approximate(bf16* p, Vec v, Lanes lanes) {
  store(p, v, lanes);
}
PUSA_INLINE void store_approximate(bf16* p, Two v, Both) { pack(p, (Bits)v.a + 0x8000u, (Bits)v.b + 0x8000u); }

PUSA_INLINE void add_squares(Vec (&chain)[2], Two v) {
  chain[0] += v.a * v.a;
  chain[1] += v.b * v.b;
}
PUSA_INLINE void add_squares(Vec (&chain)[2], Vec v) { chain[0] += v * v; }

// In scratch memory rows are padded, and whole vectors are quicker to store and load again than parts of them.
PUSA_INLINE Both whole(Both) { return {}; }
PUSA_INLINE All whole(All) { return {}; }
PUSA_INLINE All whole(First) { return {}; }

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

PUSA_INLINE Vec pair_sums(Vec u, Vec v) {  // (u0 + u1, u2 + u3, .., v0 + v1, ..)
#if defined(__clang__)
  return __builtin_shufflevector(u, v, PUSA_EVENS) + __builtin_shufflevector(u, v, PUSA_ODDS);
#else
  return __builtin_shuffle(u, v, Ints{PUSA_EVENS}) + __builtin_shuffle(u, v, Ints{PUSA_ODDS});
#endif
}

// 2^t for t in [-126, 126]. For bf16 by the minimax polynomial of degree 3 (relative error 2^-13.7).
template <class T>
PUSA_INLINE Vec power_of_2(Vec t) {
  if constexpr (sizeof(T) == 4) return exp2_bounded(t);
  const Vec magic = broadcast(12582912.0f);  // as in exp2_bounded
  const Vec shifted = t + magic, f = t - (shifted - magic);
  const Vec p = ((5.51716695414e-2f * f + 2.42611125438e-1f) * f + 6.93260985653e-1f) * f + 9.99928073346e-1f;
  return (Vec)((Bits)p + ((Bits)shifted << 23));
}

// 1 / d for d in [1, 2^126]: for bf16 to 14 bits where that is cheap.
template <class T>
PUSA_INLINE Vec reciprocal(Vec d) {
#if defined(__AVX512F__)
  const Vec q = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  return sizeof(T) == 2 ? q : q + q * (1.0f - d * q);  // Newton's step makes it 28
#else
  return 1.0f / d;
#endif
}

constexpr float kBound = 126.0f;  // of the exponent: beyond it 1 + 2^t is 1, or v / 2^t less than 1e-36

// v / (1 + 2^t), t = -v log2(e). bf16: within 2^-12.6, a tenth of what rounding adds. What a NaN makes of 2^t does not
// matter.
template <class T, bool kBounded>
PUSA_INLINE Vec silu(Vec v) {
  Vec t = v * -1.44269504089f;
  if constexpr (!kBounded) {
    const Vec low = broadcast(-kBound), high = broadcast(kBound);
    t = t < low ? low : (t > high ? high : t);
  }
  return v * reciprocal<T>(1.0f + power_of_2<T>(t));
}
template <class T, bool kBounded>
PUSA_INLINE Two silu(Two v) {
  return {silu<T, kBounded>(v.a), silu<T, kBounded>(v.b)};
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
    if (!table.data) return neutral;
    float v = 0.0f;
    with_type(table.type,
              [&](auto type) { v = factor * load(static_cast<const decltype(type)*>(table.data) + i, First{1})[0]; });
    return v == v ? v : __builtin_nanf("");
  };
  constexpr bool kPairs = sizeof(T) == 2;
  const int64_t paired = kPairs ? channels / (2 * W) * (2 * W) : 0;
  for (int64_t i = 0; i < channels; ++i) {
    const int64_t k = i % (2 * W);
    room[i < paired ? i - k + k / 2 + k % 2 * W : i] = value(i);
  }
  for (int64_t i = channels; i < channels + W; ++i) room[i] = 0.0f;  // read with the last ones
  return room;
}

// Where the tensors have pixel i of B, T, H, W, and each pixel after it.
template <class T>
class Walk {
 public:
  Walk(const VaeAct& a, int64_t i) : a_(a), w_(i % a.size[3]) {
    i /= a.size[3];
    h_ = i % a.size[2];
    i /= a.size[2];
    t_ = i % a.size[1];
    b_ = i / a.size[1];
    enter_row();
  }

  PUSA_INLINE const T* y() const {
    return a_.upsampled ? y_ + ((w_ >> 1) + (w_ & 1)) * a_.y.stride[3] + (w_ & 1) * a_.channels
                        : y_ + w_ * a_.y.stride[3];
  }
  PUSA_INLINE const T* x() const { return x_ + w_ * a_.x.stride[3]; }
  PUSA_INLINE T* r() const { return r_ + w_ * a_.r.stride[3]; }
  PUSA_INLINE T* out() const { return out_ + w_ * a_.out.stride[3]; }

  PUSA_INLINE void next() {
    if (++w_ == a_.size[3]) next_row();
  }

 private:
  void next_row() {
    w_ = 0;
    if (++h_ == a_.size[2]) {
      h_ = 0;
      if (++t_ == a_.size[1]) {
        t_ = 0;
        ++b_;
      }
    }
    if (b_ < a_.size[0]) enter_row();
  }

  void enter_row() {
    const int64_t lower = h_ & 1;
    y_ = row(a_.y, a_.upsampled ? (h_ >> 1) + lower : h_) + (a_.upsampled ? 2 * lower * a_.channels : 0);
    x_ = row(a_.x, h_);
    r_ = row(a_.r, h_);
    out_ = row(a_.out, h_);
  }

  T* row(const Pixels& p, int64_t h) const {
    return p.data ? static_cast<T*>(p.data) + b_ * p.stride[0] + t_ * p.stride[1] + h * p.stride[2] : nullptr;
  }

  const VaeAct& a_;
  int64_t b_, t_, h_, w_;
  const T *y_, *x_;
  T *r_, *out_;
};

// What follows the norm. |s / ||s||| <= 1, so that the largest gamma bounds the argument of SiLU.
enum class Last { identity, silu, bounded_silu };

Last last_step(const VaeAct& a, const float* gamma) {
  float largest = 0.0f;
  for (int64_t i = 0; i < a.channels; ++i) {
    const float size = fabsf(gamma[i]);
    if (!(size <= largest)) largest = size;  // NaN stays
  }
  if (!a.silu) return Last::identity;
  return largest < kBound / 1.4427f * 0.999f ? Last::bounded_silu : Last::silu;
}

template <class T, Last kLast>
PUSA_INLINE void finish(const float* s, const float* gamma, T* out, int64_t channels, Vec factor) {
  each_two(channels, [&](int64_t i, auto lanes) PUSA_LAMBDA {
    const auto n = load(s + i, whole(lanes)) * factor * load(gamma + i, whole(lanes));
    ahead(out + i, 1);
    if constexpr (kLast == Last::identity) {
      store_approximate(out + i, n, lanes);
    } else {
      store_approximate(out + i, silu<T, kLast == Last::bounded_silu>(n), lanes);
    }
  });
}

template <int kCount>
PUSA_INLINE void pair_up(Vec (&sums)[W]) {
  for (int k = 0; k < kCount; k += 2) sums[k / 2] = pair_sums(sums[k], sums[k + 1]);
}

// 1 / max(norm, 1e-12) of up to W pixels, of whose squares each vector holds partial sums: its lanes are added in
// pairs, two vectors to one, until one is left with a lane for each pixel. A pixel's result does not depend on its
// place.
PUSA_INLINE void factors(Vec (&squares)[W], float* factor) {
  if constexpr (W >= 16) pair_up<16>(squares);
  if constexpr (W >= 8) pair_up<8>(squares);
  pair_up<4>(squares);
  pair_up<2>(squares);
  store(factor, squares[0], All{});
  for (int k = 0; k < W; ++k) {
    const float norm = sqrtf(factor[k]);
    factor[k] = 1.0f / (norm < 1e-12f ? 1e-12f : norm);  // NaN stays
  }
}

// Pixels that wait between the two passes over them, so that their norms are taken together: as many as the nearest
// cache holds along with what they are made of.
PUSA_INLINE int64_t group_size(int64_t channels) {
  const int64_t fit = 4096 / (channels > 0 ? channels : 1);
  return fit < 1 ? 1 : (fit < W ? fit : W);
}

// s = y + bias + x, written to r and, in float32, to `sum`. Returns partial sums of its squares.
template <class T, bool kX, bool kR, bool kOut>
PUSA_INLINE Vec add_up(int64_t channels, const T* y, const float* bias, const T* x, T* r, float* sum) {
  Vec squares[2] = {};
  each_two(channels, [&](int64_t i, auto lanes) PUSA_LAMBDA {
    ahead(y + i, 0);
    auto s = load(y + i, lanes) + load(bias + i, whole(lanes));
    if constexpr (kX) {
      ahead(x + i, 0);
      s = s + load(x + i, lanes);
    }
    if constexpr (kR) {
      ahead(r + i, 1);
      store(r + i, s, lanes);
    }
    if constexpr (kOut) {
      store(sum + i, s, whole(lanes));
      add_squares(squares, s);
    }
  });
  return squares[0] + squares[1];
}

template <class T, bool kX, bool kR, bool kOut>
void act(const VaeAct& a, Span span, float* scratch) {
  const int64_t C = a.channels, group = group_size(C);
  const float* bias = row_in_order<T>(a.bias, C, 1.0f, -0.0f, scratch_row(scratch, C, W));  // s + -0.0 is s, -0.0 too
  const float* gamma = row_in_order<T>(a.gamma, C, sqrtf(static_cast<float>(C)), 0.0f, scratch_row(scratch, C, W + 1));
  const Last last = last_step(a, gamma);
  Walk<T> walk(a, span.first);
  for (int64_t first = span.first; first < span.last; first += group) {
    const int count = static_cast<int>(group < span.last - first ? group : span.last - first);
    T* pixels[W];
    Vec squares[W] = {};
    for (int k = 0; k < count; ++k, walk.next()) {
      squares[k] = add_up<T, kX, kR, kOut>(C, walk.y(), bias, kX ? walk.x() : nullptr, kR ? walk.r() : nullptr,
                                           scratch_row(scratch, C, k));
      if constexpr (kOut) pixels[k] = walk.out();
    }
    if constexpr (kOut) {
      float factor[W];
      factors(squares, factor);
      for (int k = 0; k < count; ++k) {
        const float* sum = scratch_row(scratch, C, k);
        const Vec scale = broadcast(factor[k]);
        switch (last) {
          case Last::identity:
            finish<T, Last::identity>(sum, gamma, pixels[k], C, scale);
            break;
          case Last::silu:
            finish<T, Last::silu>(sum, gamma, pixels[k], C, scale);
            break;
          case Last::bounded_silu:
            finish<T, Last::bounded_silu>(sum, gamma, pixels[k], C, scale);
            break;
        }
      }
    }
  }
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
