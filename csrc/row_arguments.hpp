// From DLPack tensors to arguments of the row kernels. Every function throws std::invalid_argument (ValueError) where a
// tensor is not of the shape, dtype or strides that the kernel will trust.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "row_ops.hpp"
#include "tensor_view.hpp"

namespace pusa {

using Optional = std::optional<TensorView>;

inline Optional optional(const char* name, pybind11::handle source) {
  return source.is_none() ? std::nullopt : Optional(std::in_place, name, source);
}

inline void require_together(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Type type_of(const TensorView& x) {
  if (!x.is_float32() && !x.is_bfloat16()) x.fail("must be float32 or bfloat16", x.dtype());
  return x.is_float32() ? Type::float32 : Type::bfloat16;
}

inline void require_type(const TensorView& x, Type type) {
  if (type_of(x) != type) x.fail("must have the dtype of the tensors that it goes with", x.dtype());
}

inline Size size_of(const TensorView& x) {
  x.require_rank(3);
  return {x.size(0), x.size(1), x.size(2)};
}

// [B, L, D] of float32 or bf16, any strides with a last one of 1.
inline Rows input(const TensorView& x, const Size& size) {
  x.require_shape({size.batch, size.tokens, size.width});
  x.require_unit_last_stride();
  return {x.data(), type_of(x), x.stride(0), x.stride(1)};
}

inline Rows input(const TensorView& x, const Size& size, Type type) {
  require_type(x, type);
  return input(x, size);
}

inline Rows output(const TensorView& x, const Size& size, Type type) {
  x.require_contiguous();
  return input(x, size, type);
}

template <class... More>
Rows input(const Optional& x, const Size& size, More... more) {
  return x ? input(*x, size, more...) : Rows{nullptr, Type::float32, 0, 0};
}

// [D] of float32 or bf16.
inline Table base_row(const TensorView& weight, std::int64_t width) {
  weight.require_shape({width});
  weight.require_unit_last_stride();
  return {nullptr, weight.data(), Type::float32, type_of(weight), 0, 0, 1};
}

// The pair of arguments that make up a table: `frame` [B, F, D] with F a divisor of L, and `base` [D], added to its
// rows.
class FrameTable {
 public:
  FrameTable(const char* frame_name, pybind11::handle frame, const char* base_name, pybind11::handle base)
      : frame_(optional(frame_name, frame)), base_(optional(base_name, base)) {}

  explicit operator bool() const { return frame_ || base_; }
  std::int64_t frames() const { return frame_ ? frame_->size(1) : 1; }

  Table table(const Size& size) const {
    Table rows = base_ ? base_row(*base_, size.width) : Table{nullptr, nullptr, Type::float32, Type::float32, 0, 0, 1};
    if (!frame_) return rows;
    frame_->require_rank(3);
    frame_->require_shape({size.batch, frames(), size.width});
    frame_->require_unit_last_stride();
    if (frames() < 1 || size.tokens % frames() != 0) {
      frame_->fail("must have a number of frames that divides " + std::to_string(size.tokens) + " tokens",
                   frame_->shape());
    }
    rows.frame = frame_->data();
    rows.frame_type = type_of(*frame_);
    rows.batch = frame_->stride(0);
    rows.step = frame_->stride(1);
    rows.tokens = std::max<std::int64_t>(size.tokens / frames(), 1);
    return rows;
  }

 private:
  Optional frame_, base_;
};

inline float* floats(const TensorView& x, std::initializer_list<std::int64_t> shape) {
  if (!x.is_float32()) x.fail("must be float32", x.dtype());
  x.require_shape(shape);
  x.require_contiguous();
  return static_cast<float*>(x.data());
}

// Sums over the tokens of each frame, float32 [B, F, D].
inline RowSums frame_sums(const Optional& sums, std::int64_t frames, const Size& size) {
  if (!sums) return {nullptr, 0};
  return {floats(*sums, {size.batch, frames, size.width}), size.batch * frames};
}

// Sums over all tokens, float32 [D].
inline RowSums all_sums(const Optional& sums, std::int64_t width) {
  return sums ? RowSums{floats(*sums, {width}), 1} : RowSums{nullptr, 0};
}

// C elements of float32 or bf16, contiguous, of any shape.
inline Table flat_row(const Optional& row, std::int64_t channels) {
  if (!row) return {nullptr, nullptr, Type::float32, Type::float32, 0, 0, 1};
  if (row->numel() != channels) row->fail("must have " + std::to_string(channels) + " elements", row->shape());
  row->require_contiguous();
  return {nullptr, row->data(), Type::float32, type_of(*row), 0, 0, 1};
}

// [B, T, H, W, C] of the given sizes and type, with a last stride of 1; an output may not be expanded memory.
inline Pixels pixels(const Optional& x, std::initializer_list<std::int64_t> shape, Type type, bool is_output) {
  Pixels view{};
  if (!x) return view;
  x->require_shape(shape);
  require_type(*x, type);
  x->require_unit_last_stride();
  view.data = x->data();
  for (int i = 0; i < 4; ++i) {
    view.stride[i] = x->stride(i);
    if (is_output && x->size(i) > 1 && view.stride[i] == 0) {
      x->fail("must not be expanded memory, where several elements are one", "a stride of 0");
    }
  }
  return view;
}

// [B, L, H, K] as rows of width H * K: heads side by side, other strides free.
inline Size size_of_heads(const TensorView& x) {
  x.require_rank(4);
  return {x.size(0), x.size(1), x.size(2) * x.size(3)};
}

inline Rows heads(const TensorView& x, const TensorView& like, Type type) {
  x.require_shape({like.size(0), like.size(1), like.size(2), like.size(3)});
  x.require_unit_last_stride();
  if (x.size(2) > 1 && x.stride(2) != x.size(3)) {
    x.fail("must have its heads side by side", "a head stride of " + std::to_string(x.stride(2)));
  }
  require_type(x, type);
  return {x.data(), type, x.stride(0), x.stride(1)};
}

// Angles cos, sin [P, K / 2] for the grid (F, h, w) of the tokens of q [B, L, H, K].
inline Rope rope(const TensorView& cos, const TensorView& sin, std::int64_t F, std::int64_t h, std::int64_t w,
                 const TensorView& q) {
  const std::int64_t tokens = q.size(1), head = q.size(3);
  const bool some = F > 0 && h > 0 && w > 0 && tokens % F == 0 && tokens / F % h == 0 && tokens / F / h == w;
  const bool none = tokens == 0 && std::min({F, h, w}) == 0;
  if (!some && !none) {
    const std::string grid = std::to_string(F) + ", " + std::to_string(h) + ", " + std::to_string(w);
    throw std::invalid_argument("grid [" + grid + "] does not hold " + std::to_string(tokens) + " tokens");
  }
  if (head < 2 || head % 2 != 0) q.fail("must have an even head width", q.shape());
  cos.require_rank(2);
  if (cos.size(0) < std::max({F, h, w})) cos.fail("must have a row for each position of the grid", cos.shape());
  return {floats(cos, {cos.size(0), head / 2}), floats(sin, {cos.size(0), head / 2}), head, F, h, w};
}

// Whether two views of the same sizes, `data` not null, begin at the same element and step alike.
inline bool same_memory(const Pixels& a, const Pixels& b, const std::int64_t* size) {
  bool same = a.data == b.data;
  for (int i = 0; i < 4; ++i) same = same && (size[i] == 1 || a.stride[i] == b.stride[i]);
  return same;
}

// Outputs begin where no other tensor does, unless r is x or y as a whole.
inline void require_apart(const VaeAct& a) {
  const auto clash = [](const Pixels& one, const Pixels& other) { return one.data && one.data == other.data; };
  for (const Pixels* other : {&a.x, &a.y, &a.r}) {
    require_together(!clash(a.out, *other), "out cannot be the memory of x, y or r");
  }
  require_together(!clash(a.r, a.x) || same_memory(a.r, a.x, a.size),
                   "r can be x only as a whole, with the same strides");
  require_together(!clash(a.r, a.y) || (!a.upsampled && same_memory(a.r, a.y, a.size)),
                   "r can be y only as a whole, with the same strides and not upsampled");
}

// Joins axes along which every tensor steps evenly, from W outwards: then one run of pixels is all of them. Not
// upsampled.
inline void join_axes(VaeAct& a) {
  Pixels* const views[] = {&a.y, &a.x, &a.r, &a.out};
  int last = 3;
  for (int axis = 2; axis >= 0; --axis) {
    const std::int64_t outer = a.size[axis], inner = a.size[last];
    bool even = true;
    for (const Pixels* p : views) {
      even = even && (!p->data || outer == 1 || inner == 1 || p->stride[axis] == inner * p->stride[last]);
    }
    if (!even) --last;
    for (Pixels* p : views) {
      if (!even || (inner == 1 && outer != 1)) p->stride[last] = p->stride[axis];
    }
    a.size[last] = even ? outer * inner : outer;
  }
  for (int axis = 0; axis < last; ++axis) a.size[axis] = 1;
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  return std::min(threads, 1024);
}

}  // namespace pusa
