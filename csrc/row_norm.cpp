// residual_norm and rms_norm, forward and backward. Compiled once per instruction set; see row_math.hpp.
#include "row_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

// The row is made once, in float32 and within the nearest cache: the mean, the variance about it and the result each
// read it there. For float32 that is r (or x) itself, else `scratch`.
template <class T, class Y>
void forward(const ResidualNormForward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  const float one = a.affine ? 0.0f : 1.0f;
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  FrameRow gates(a.gate, D, scratch_row(scratch, D, 1)), scales(a.scale, D, scratch_row(scratch, D, 2));
  FrameRow shifts(a.shift, D, scratch_row(scratch, D, 3));
  each_token(a.size, a.frames, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t f) PUSA_LAMBDA {
    const T* x = row<T>(a.x, b, t);
    const Y* y = a.y.data ? row<Y>(a.y, b, t) : nullptr;
    T* r = y ? row<T>(a.r, b, t) : nullptr;
    T* n = row<T>(a.n, b, t);
    const float *gate = gates.at(b, f), *scale = scales.at(b, f), *shift = shifts.at(b, f);

    const float* v = scratch;
    Sum total;
    if (y) {
      each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
        const Vec stream = read(x + i, lanes), update = read(y + i, lanes);
        const Vec out = gate ? stream + load(gate + i, lanes) * update : stream + update;
        total.chain[chain] += out;
        write(r + i, out, lanes);
        if constexpr (!kFloat) store(scratch + i, out, lanes);
      });
      if constexpr (kFloat) v = r;
    } else {
      each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
        const Vec stream = read(x + i, lanes);
        total.chain[chain] += stream;
        if constexpr (!kFloat) store(scratch + i, stream, lanes);
      });
      if constexpr (kFloat) v = x;
    }
    const float mean = total.total() / static_cast<float>(D);

    Sum squares;
    each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
      const Vec d = keep(load(v + i, lanes) - mean, lanes);
      squares.chain[chain] += d * d;
    });
    const float rstd = reciprocal_root(squares.total() / static_cast<float>(D) + a.eps);

    if (scale) {
      each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
        const Vec xhat = (load(v + i, lanes) - mean) * rstd;
        write(n + i, xhat * (one + load(scale + i, lanes)) + load(shift + i, lanes), lanes);
      });
    } else {
      each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA { write(n + i, (load(v + i, lanes) - mean) * rstd, lanes); });
    }
    a.mean[i_row] = mean;
    a.rstd[i_row] = rstd;
  });
}

// dx = dr + rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dn * (1 + scale) ; dy = gate * dx.
template <class T, class Y>
void backward(const ResidualNormBackward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  const float one = a.affine ? 0.0f : 1.0f;
  FrameRow gates(a.gate, D, scratch_row(scratch, D, 0)), scales(a.scale, D, scratch_row(scratch, D, 1));
  float *const dgate = cleared(a.dgate, D, span), *const dscale = cleared(a.dscale, D, span);
  float* const dshift = cleared(a.dshift, D, span);
  each_token(a.size, a.frames, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t f) PUSA_LAMBDA {
    const T *dn = row<T>(a.dn, b, t), *r = row<T>(a.r, b, t);
    const T* dr = a.dr.data ? row<T>(a.dr, b, t) : nullptr;
    const Y* y = dgate ? row<Y>(a.y, b, t) : nullptr;
    T* dx = row<T>(a.dx, b, t);
    Y* dy = a.dy.data ? row<Y>(a.dy, b, t) : nullptr;
    const float *gate = gates.at(b, f), *scale = scales.at(b, f);
    const float mean = a.mean[i_row], rstd = a.rstd[i_row];

    Sum sum_g, sum_gx;
    each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
      const Vec xhat = (read(r + i, lanes) - mean) * rstd, d = read(dn + i, lanes);
      const Vec g = scale ? d * (one + load(scale + i, lanes)) : d;
      sum_g.chain[chain] += g;
      sum_gx.chain[chain] += g * xhat;
      if (dscale) {
        store(dscale + i, load(dscale + i, lanes) + d * xhat, lanes);
        store(dshift + i, load(dshift + i, lanes) + d, lanes);
      }
    });
    const float mean_g = sum_g.total() / static_cast<float>(D), mean_gx = sum_gx.total() / static_cast<float>(D);

    each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      const Vec xhat = (load(r + i, lanes) - mean) * rstd, d = load(dn + i, lanes);
      const Vec g = scale ? d * (one + load(scale + i, lanes)) : d;
      Vec out = rstd * (g - mean_g - xhat * mean_gx);
      if (dr) out += read(dr + i, lanes);
      write(dx + i, out, lanes);
      if (dy) write(dy + i, out * load(gate + i, lanes), lanes);
      if (dgate) store(dgate + i, load(dgate + i, lanes) + out * read(y + i, lanes), lanes);
    });
  });
}

template <class T>
void rms_forward(const RmsNormForward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  const float* weight = FrameRow(a.weight, D, scratch).at(0, 0);
  each_token(a.size, kOneFrame, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t) PUSA_LAMBDA {
    const T* x = row<T>(a.x, b, t);
    T* n = row<T>(a.n, b, t);
    Sum squares;
    each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
      const Vec v = read(x + i, lanes);
      squares.chain[chain] += v * v;
    });
    const float rstd = reciprocal_root(squares.total() / static_cast<float>(D) + a.eps);
    each(D, [&](int64_t i, auto lanes, int)
                PUSA_LAMBDA { write(n + i, load(x + i, lanes) * rstd * load(weight + i, lanes), lanes); });
    a.rstd[i_row] = rstd;
  });
}

// dx = rstd * (g - xhat * mean(g * xhat)), g = dn * weight, xhat = x * rstd.
template <class T>
void rms_backward(const RmsNormBackward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  const float* weight = FrameRow(a.weight, D, scratch).at(0, 0);
  float* const dweight = cleared(a.dweight, D, span);
  each_token(a.size, kOneFrame, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t) PUSA_LAMBDA {
    const T *dn = row<T>(a.dn, b, t), *x = row<T>(a.x, b, t);
    T* dx = row<T>(a.dx, b, t);
    const float rstd = a.rstd[i_row];
    Sum sum_gx;
    each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
      const Vec dxhat = read(dn + i, lanes) * (read(x + i, lanes) * rstd);
      sum_gx.chain[chain] += dxhat * load(weight + i, lanes);
      if (dweight) store(dweight + i, load(dweight + i, lanes) + dxhat, lanes);
    });
    const float mean_gx = sum_gx.total() / static_cast<float>(D);
    each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
      const Vec xhat = load(x + i, lanes) * rstd, g = load(dn + i, lanes) * load(weight + i, lanes);
      write(dx + i, rstd * (g - xhat * mean_gx), lanes);
    });
  });
}

}  // namespace

void residual_norm_forward(const ResidualNormForward& args, Span span, float* scratch) {
  with_type(args.x.type, [&](auto x) {
    with_type(args.y.type, [&](auto y) { forward<decltype(x), decltype(y)>(args, span, scratch); });
  });
}

void residual_norm_backward(const ResidualNormBackward& args, Span span, float* scratch) {
  with_type(args.r.type, [&](auto x) {
    with_type(args.y.type, [&](auto y) { backward<decltype(x), decltype(y)>(args, span, scratch); });
  });
}

void rms_norm_forward(const RmsNormForward& args, Span span, float* scratch) {
  with_type(args.x.type, [&](auto x) { rms_forward<decltype(x)>(args, span, scratch); });
}

void rms_norm_backward(const RmsNormBackward& args, Span span, float* scratch) {
  with_type(args.x.type, [&](auto x) { rms_backward<decltype(x)>(args, span, scratch); });
}

}  // namespace PUSA_ISA
}  // namespace pusa
