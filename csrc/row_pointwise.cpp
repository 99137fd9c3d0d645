// gated_residual, guided_euler_step, GELU, and a linear layer on a few rows. Compiled once per instruction set; see
// row_math.hpp.
#include "row_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

template <class T, class Y>
void gated_forward(const GatedResidualForward& a, Span span, float* scratch) {
  FrameRow gates(a.gate, a.size.width, scratch);
  each_token(a.size, a.frames, span, [&](int64_t, int64_t b, int64_t t, int64_t f) PUSA_LAMBDA {
    const T* x = row<T>(a.x, b, t);
    const Y* y = row<Y>(a.y, b, t);
    T* r = row<T>(a.r, b, t);
    const float* gate = gates.at(b, f);
    each(a.size.width, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      const Vec stream = read(x + i, lanes), update = read(y + i, lanes);
      write(r + i, gate ? stream + load(gate + i, lanes) * update : stream + update, lanes);
    });
  });
}

template <class T, class Y>
void gated_backward(const GatedResidualBackward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  FrameRow gates(a.gate, D, scratch);
  float* const dgate = cleared(a.dgate, D, span);
  each_token(a.size, a.frames, span, [&](int64_t, int64_t b, int64_t t, int64_t f) PUSA_LAMBDA {
    const T* dr = row<T>(a.dr, b, t);
    const Y* y = dgate ? row<Y>(a.y, b, t) : nullptr;
    Y* dy = row<Y>(a.dy, b, t);
    const float* gate = gates.at(b, f);
    each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      const Vec d = read(dr + i, lanes);
      if (dgate) store(dgate + i, load(dgate + i, lanes) + d * read(y + i, lanes), lanes);
      write(dy + i, d * load(gate + i, lanes), lanes);
    });
  });
}

// span counts planes [frames]: plane p is of frame p % frames.
template <class T, class V>
void euler_step(const GuidedEulerStep& a, Span span) {
  for (int64_t plane = span.first; plane < span.last; ++plane) {
    const T* x = static_cast<const T*>(a.x) + plane * a.pixels;
    T* out = static_cast<T*>(a.out) + plane * a.pixels;
    const float dsigma = a.dsigma[plane % a.frames];
    if (dsigma == 0.0f) {
      __builtin_memcpy(out, x, static_cast<size_t>(a.pixels) * sizeof(T));
      continue;
    }
    const V* v = static_cast<const V*>(a.v) + plane * a.pixels;
    const V* v_neg = a.v_neg ? static_cast<const V*>(a.v_neg) + plane * a.pixels : nullptr;
    each(a.pixels, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      Vec velocity = read(v + i, lanes);
      if (v_neg) {
        const Vec negative = read(v_neg + i, lanes);
        velocity = negative + a.guidance * (velocity - negative);
      }
      write(out + i, read(x + i, lanes) + velocity * dsigma, lanes);
    });
  }
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3): x * (1 + tanh(u)) / 2 without its cancellation. As
// torch's, it is NaN at -inf.
PUSA_INLINE Vec gelu_tanh(Vec x) {
  constexpr float kLinear = -2.3022081985f;  // -2 sqrt(2 / pi) log2(e)
  constexpr float kCubic = -0.10294323960f;  // times 0.044715
  constexpr float kBound = 126.0f;           // beyond it 1 + 2^t is 1, or x / 2^t less than 1e-36
  const Vec t = x * (kLinear + kCubic * (x * x));
  const Vec low = broadcast(-kBound), high = broadcast(kBound);
  const Vec bounded = t < low ? low : (t > high ? high : t);
  const Vec power = t > high ? broadcast(__builtin_inff()) : exp2_bounded(bounded);
  return x / (1.0f + power);
}

template <class T>
void gelu_span(const Gelu& a, Span span) {
  const T* x = static_cast<const T*>(a.x) + span.first;
  T* out = static_cast<T*>(a.out) + span.first;
  each(span.last - span.first,
       [&](int64_t i, auto lanes, int) PUSA_LAMBDA { store(out + i, gelu_tanh(read(x + i, lanes)), lanes); });
}

// d gelu / dx = s + 2 x u' s (1 - s), s = 1 / (1 + exp(-2 u)). Beyond 12 it is 1, or less than 1e-35; squares stay
// finite.
PUSA_INLINE Vec gelu_tanh_slope(Vec x) {
  constexpr float kLinear = -2.3022081985f, kCubic = -0.10294323960f;   // as in gelu_tanh
  constexpr float kSlope = 1.5957691216f, kSlopeCubic = 0.2140644490f;  // 2 sqrt(2 / pi), and times 3 * 0.044715
  constexpr float kBound = 126.0f, kEnd = 12.0f;
  const Vec near_x = x < broadcast(-kEnd) ? broadcast(-kEnd) : (x > broadcast(kEnd) ? broadcast(kEnd) : x);
  const Vec square = near_x * near_x;
  const Vec t = near_x * (kLinear + kCubic * square);
  const Vec low = broadcast(-kBound), high = broadcast(kBound);
  const Vec power = exp2_bounded(t < low ? low : (t > high ? high : t));
  const Vec s = 1.0f / (1.0f + power);
  return s + near_x * (kSlope + kSlopeCubic * square) * (power * s) * s;
}

template <class T>
void gelu_backward_span(const GeluBackward& a, Span span) {
  const T* dy = static_cast<const T*>(a.dy) + span.first;
  const T* x = static_cast<const T*>(a.x) + span.first;
  T* dx = static_cast<T*>(a.dx) + span.first;
  each(span.last - span.first, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
    store(dx + i, read(dy + i, lanes) * gelu_tanh_slope(read(x + i, lanes)), lanes);
  });
}

// span counts output features. A weight row is read from memory once, and from the cache for every further row of x.
template <class W_, class B>
void linear_span(const LinearRows& a, Span span) {
  for (int64_t feature = span.first; feature < span.last; ++feature) {
    const W_* weight = row<W_>(a.weight, 0, feature);
    float bias = 0.0f;
    if (a.bias.data) bias = load(static_cast<const B*>(a.bias.data) + feature, First{1})[0];
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* x = a.x + r * a.in;
      Sum product;
      each(a.in, [&](int64_t i, auto lanes, int chain)
                     PUSA_LAMBDA { product.chain[chain] += read(weight + i, lanes) * load(x + i, lanes); });
      a.out[r * a.features + feature] = product.total() + bias;
    }
  }
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& args, Span span, float* scratch) {
  with_type(args.x.type, [&](auto x) {
    with_type(args.y.type, [&](auto y) { gated_forward<decltype(x), decltype(y)>(args, span, scratch); });
  });
}

void gated_residual_backward(const GatedResidualBackward& args, Span span, float* scratch) {
  with_type(args.dr.type, [&](auto x) {
    with_type(args.y.type, [&](auto y) { gated_backward<decltype(x), decltype(y)>(args, span, scratch); });
  });
}

void guided_euler_step(const GuidedEulerStep& args, Span span, float*) {
  with_type(args.type,
            [&](auto x) { with_type(args.v_type, [&](auto v) { euler_step<decltype(x), decltype(v)>(args, span); }); });
}

void gelu(const Gelu& args, Span span, float*) {
  with_type(args.type, [&](auto x) { gelu_span<decltype(x)>(args, span); });
}

void gelu_backward(const GeluBackward& args, Span span, float*) {
  with_type(args.type, [&](auto x) { gelu_backward_span<decltype(x)>(args, span); });
}

void linear_rows(const LinearRows& args, Span span, float*) {
  with_type(args.weight.type, [&](auto weight) {
    with_type(args.bias.type, [&](auto bias) { linear_span<decltype(weight), decltype(bias)>(args, span); });
  });
}

}  // namespace PUSA_ISA
}  // namespace pusa
