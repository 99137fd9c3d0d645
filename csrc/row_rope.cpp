// RMSNorm of q and k over all heads, then rotation of adjacent pairs. Compiled once per instruction set; see
// row_math.hpp.
#include "row_math.hpp"

namespace pusa {
namespace PUSA_ISA {
namespace {

// A token's angles laid out as the rotation of a vector of pairs needs them: v * cos + swap_pairs(v) * sin, with sin's
// sign alternating. Kept for the fewest heads that fill whole vectors, and renewed only where the token's position
// changed.
class Angles {
 public:
  Angles(const Rope& rope, int64_t width, float* cos_room, float* sin_room)  // of `width` floats each
      : rope_(rope), cos_(cos_room), sin_(sin_room), period_(rope.head) {
    while (period_ % W != 0 && period_ < width) period_ += rope.head;
  }

  PUSA_INLINE int64_t period() const { return period_; }
  PUSA_INLINE const float* cos() const { return cos_; }
  PUSA_INLINE const float* sin() const { return sin_; }

  void move_to(int64_t t) {
    const int64_t token = rope_.first + t, half = rope_.head / 2, third = rope_.head / 6;
    const int64_t bounds[4] = {0, half - 2 * third, half - third, half};
    const int64_t position[3] = {token / (rope_.height * rope_.width), token / rope_.width % rope_.height,
                                 token % rope_.width};
    for (int axis = 0; axis < 3; ++axis) {
      if (position[axis] == position_[axis]) continue;
      position_[axis] = position[axis];
      const float *cos = rope_.cos + position[axis] * half, *sin = rope_.sin + position[axis] * half;
      for (int64_t start = 0; start < period_; start += rope_.head) {
        for (int64_t j = bounds[axis]; j < bounds[axis + 1]; ++j) {
          cos_[start + 2 * j] = cos_[start + 2 * j + 1] = cos[j];
          sin_[start + 2 * j] = -sin[j];
          sin_[start + 2 * j + 1] = sin[j];
        }
      }
    }
  }

 private:
  Rope rope_;
  float *cos_, *sin_;
  int64_t period_;
  int64_t position_[3] = {-1, -1, -1};
};

// What both directions share: the angles, and q's and k's weights in float32. Takes rows 0 .. 3 of the scratch memory.
struct Factors {
  Angles angles;
  const float* weights[2];

  template <class Args>
  Factors(const Args& a, float* scratch)
      : angles(a.rope, a.size.width, scratch_row(scratch, a.size.width, 0), scratch_row(scratch, a.size.width, 1)) {
    for (int which = 0; which < 2; ++which) {
      float* room = scratch_row(scratch, a.size.width, 2 + which);
      weights[which] = FrameRow(a.weight[which], a.size.width, room).at(0, 0);
    }
  }
};

// body(i, j, lanes, chain) for column i of a row and j of the angles.
template <class Body>
PUSA_INLINE void each_column(int64_t width, int64_t period, Body body) {
  for (int64_t start = 0; start < width; start += period) {
    each(start + period < width ? period : width - start,
         [&](int64_t j, auto lanes, int chain) PUSA_LAMBDA { body(start + j, j, lanes, chain); });
  }
}

template <class T>
void forward(const QkRopeForward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  Factors factors(a, scratch);
  const int64_t period = factors.angles.period();
  const float *cos = factors.angles.cos(), *sin = factors.angles.sin();
  each_token(a.size, kOneFrame, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t) PUSA_LAMBDA {
    factors.angles.move_to(t);
    for (int which = 0; which < 2; ++which) {
      const T* x = row<T>(a.in[which], b, t);
      T* out = row<T>(a.out[which], b, t);
      const float* weight = factors.weights[which];
      Sum squares;
      each(D, [&](int64_t i, auto lanes, int chain) PUSA_LAMBDA {
        const Vec v = read(x + i, lanes);
        squares.chain[chain] += v * v;
      });
      const float rstd = reciprocal_root(squares.total() / static_cast<float>(D) + a.eps);
      each_column(D, period, [&](int64_t i, int64_t j, auto lanes, int) PUSA_LAMBDA {
        const Vec n = load(x + i, lanes) * rstd * load(weight + i, lanes);
        write(out + i, n * load(cos + j, lanes) + swap_pairs(n) * load(sin + j, lanes), lanes);
      });
      a.rstd[which][i_row] = rstd;
    }
  });
}

// dn is dout turned back, dout * cos - swap_pairs(dout) * sin ; then the RMSNorm's: g = dn * weight,
// dx = rstd * (g - xhat * mean(g * xhat)).
template <class T>
void backward(const QkRopeBackward& a, Span span, float* scratch) {
  const int64_t D = a.size.width;
  Factors factors(a, scratch);
  const int64_t period = factors.angles.period();
  const float *cos = factors.angles.cos(), *sin = factors.angles.sin();
  float* g = scratch_row(scratch, D, 4);
  float* const dweights[2] = {cleared(a.dweight[0], D, span), cleared(a.dweight[1], D, span)};
  each_token(a.size, kOneFrame, span, [&](int64_t i_row, int64_t b, int64_t t, int64_t) PUSA_LAMBDA {
    factors.angles.move_to(t);
    for (int which = 0; which < 2; ++which) {
      const T *dout = row<T>(a.dout[which], b, t), *x = row<T>(a.in[which], b, t);
      T* dx = row<T>(a.din[which], b, t);
      const float* weight = factors.weights[which];
      float* dweight = dweights[which];
      const float rstd = a.rstd[which][i_row];
      Sum sum_gx;
      each_column(D, period, [&](int64_t i, int64_t j, auto lanes, int chain) PUSA_LAMBDA {
        const Vec d = read(dout + i, lanes), xhat = read(x + i, lanes) * rstd;
        const Vec dn = d * load(cos + j, lanes) - swap_pairs(d) * load(sin + j, lanes);
        const Vec dxhat = dn * load(weight + i, lanes);
        sum_gx.chain[chain] += dxhat * xhat;
        store(g + i, dxhat, lanes);
        if (dweight) store(dweight + i, load(dweight + i, lanes) + dn * xhat, lanes);
      });
      const float mean_gx = sum_gx.total() / static_cast<float>(D);
      each(D, [&](int64_t i, auto lanes, int) PUSA_LAMBDA {
        const Vec xhat = load(x + i, lanes) * rstd;
        write(dx + i, rstd * (load(g + i, lanes) - xhat * mean_gx), lanes);
      });
    }
  });
}

}  // namespace

void qk_rope_forward(const QkRopeForward& args, Span span, float* scratch) {
  with_type(args.in[0].type, [&](auto x) { forward<decltype(x)>(args, span, scratch); });
}

void qk_rope_backward(const QkRopeBackward& args, Span span, float* scratch) {
  with_type(args.in[0].type, [&](auto x) { backward<decltype(x)>(args, span, scratch); });
}

}  // namespace PUSA_ISA
}  // namespace pusa
