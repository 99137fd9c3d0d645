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
inline Table weight_row(const TensorView& weight, std::int64_t width) {
  weight.require_shape({width});
  weight.require_unit_last_stride();
  return {weight.data(), type_of(weight), 0, 0};
}

// [B, F, D] of float32 or bf16; `frames` has checked its shape.
inline Table table(const Optional& x) {
  return x ? Table{x->data(), type_of(*x), x->stride(0), x->stride(1)} : Table{};
}

// What tables [B, F, D], of one F, say of the tokens `first` .. `first` + L - 1 of a clip with `tokens` to a frame.
inline Frames frames(std::initializer_list<const Optional*> tables, const Size& size, std::int64_t tokens,
                     std::int64_t first) {
  Frames found = kOneFrame;
  if (size.tokens == 0) tokens = 1;  // of any number, none reads a row
  for (const Optional* x : tables) {
    if (!*x) continue;
    const TensorView& rows = **x;
    rows.require_rank(3);
    if (found.tokens == kOneFrame.tokens) found = {tokens, first, rows.size(1)};
    rows.require_shape({size.batch, found.count, size.width});
    rows.require_unit_last_stride();
    std::int64_t capacity = 0;
    if (tokens < 1 || first < 0 || __builtin_mul_overflow(found.count, tokens, &capacity) || size.tokens > capacity ||
        first > capacity - size.tokens) {
      rows.fail("must have a frame for each of " + std::to_string(size.tokens) + " tokens from " +
                    std::to_string(first) + " on, " + std::to_string(tokens) + " to a frame",
                rows.shape());
    }
  }
  return found;
}

inline float* floats(const TensorView& x, std::initializer_list<std::int64_t> shape) {
  if (!x.is_float32()) x.fail("must be float32", x.dtype());
  x.require_shape(shape);
  x.require_contiguous();
  return static_cast<float*>(x.data());
}

// Sums over the tokens of each frame, float32 [B, F, D].
inline RowSums frame_sums(const Optional& sums, const Frames& frames, const Size& size) {
  if (!sums) return {};
  return {floats(*sums, {size.batch, frames.count, size.width}), size.batch * frames.count, nullptr};
}

// Sums over all tokens, float32 [D].
inline RowSums all_sums(const Optional& sums, std::int64_t width) {
  return sums ? RowSums{floats(*sums, {width}), 1, nullptr} : RowSums{};
}

// C elements of float32 or bf16, contiguous, of any shape.
inline Table flat_row(const Optional& row, std::int64_t channels) {
  if (!row) return {};
  if (row->numel() != channels) row->fail("must have " + std::to_string(channels) + " elements", row->shape());
  row->require_contiguous();
  return {row->data(), type_of(*row), 0, 0};
}

// [B, T, H, W, C] of the given sizes and type, with a last stride of 1.
inline Pixels pixels(const TensorView& x, std::initializer_list<std::int64_t> shape, Type type) {
  x.require_shape(shape);
  require_type(x, type);
  x.require_unit_last_stride();
  return {x.data(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

inline Pixels pixels(const Optional& x, std::initializer_list<std::int64_t> shape, Type type) {
  return x ? pixels(*x, shape, type) : Pixels{};
}

// And not expanded memory.
inline Pixels output_pixels(const Optional& x, std::initializer_list<std::int64_t> shape, Type type) {
  for (int i = 0; x && i < x->ndim(); ++i) {
    if (x->size(i) > 1 && x->stride(i) == 0) x->fail("must not be expanded memory", "a stride of 0");
  }
  return pixels(x, shape, type);
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

// Angles cos, sin [P, K / 2] for tokens `first` .. `first` + L - 1 of a clip with the grid (F, h, w): those of q
// [B, L, H, K].
inline Rope rope(const TensorView& cos, const TensorView& sin, std::int64_t F, std::int64_t h, std::int64_t w,
                 std::int64_t first, const TensorView& q) {
  const std::int64_t tokens = q.size(1), head = q.size(3);
  std::int64_t all = 0;
  if (std::min({F, h, w, first}) < 0 || __builtin_mul_overflow(F, h, &all) || __builtin_mul_overflow(all, w, &all) ||
      tokens > all || first > all - tokens) {
    const std::string grid = std::to_string(F) + ", " + std::to_string(h) + ", " + std::to_string(w);
    q.fail("must be tokens of the grid [" + grid + "]",
           std::to_string(tokens) + " from " + std::to_string(first) + " on");
  }
  if (head < 2 || head % 2 != 0) q.fail("must have an even head width", q.shape());
  cos.require_rank(2);
  if (cos.size(0) < std::max({F, h, w})) cos.fail("must have a row for each position of the grid", cos.shape());
  return {floats(cos, {cos.size(0), head / 2}), floats(sin, {cos.size(0), head / 2}), head, F, h, w, first};
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  return std::min(threads, 1024);
}

}  // namespace pusa
