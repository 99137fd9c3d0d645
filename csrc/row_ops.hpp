// CPU versions of the row kernels of the transformer and the VAE: the formulas of kernels/reference.py in one pass over
// memory.
//
// B batch, L tokens, D width, F frames. A token's row is contiguous; "row" counts tokens over the batch, 0 .. B * L.
// All arithmetic is float32; bf16 is read exactly and rounded to nearest even once, at the store. Every result is the
// same for any number of threads: rows do not depend on each other, and sums over rows are taken over blocks of rows
// whose bounds depend on the shapes alone, then over the blocks in order.
#pragma once

#include <cstdint>

namespace pusa {

enum class Type { float32, bfloat16 };

// Tokens of width D at `data + b * batch + n * token`, strides in elements. data null: absent.
struct Rows {
  void* data;
  Type type;
  std::int64_t batch, token;
};

// The row of frame f and sequence b is at data + b * batch + f * step, strides in elements: a table [B, F, D], or one
// row [D] for all, whose strides are 0. data null: absent.
struct Table {
  const void* data;
  Type type;
  std::int64_t batch, step;
};

// Token t of a sequence belongs to frame (first + t) / tokens, one of the `count` rows of every table of its op.
struct Frames {
  std::int64_t tokens, first, count;
};
constexpr Frames kOneFrame = {INT64_MAX, 0, 1};

struct Size {
  std::int64_t batch, tokens, width;
};

// Sums over tokens, float32 [groups, D]: one group for each sequence and frame, or one for all. data null: unwanted.
// `partial` is set by run(): each block of rows writes its sums to a row [D] of it.
struct RowSums {
  float* data;
  std::int64_t groups;
  float* partial;
};

// r = x + gate * y ; n = LN(r) * (1 + scale) + shift, or LN(r) * scale + shift where `affine`, or LN(r) without scale.
struct ResidualNormForward {
  Size size;
  Frames frames;
  Rows x, y, r, n;
  Table gate, scale, shift;
  bool affine;
  float* mean;
  float* rstd;
  float eps;
};

struct ResidualNormBackward {
  Size size;
  Frames frames;
  Rows dr, dn, r, y, dx, dy;
  Table gate, scale;
  bool affine;
  const float* mean;
  const float* rstd;
  RowSums dgate, dscale, dshift;  // of dx * y, dn * xhat, dn
};

struct GatedResidualForward {  // r = x + gate * y
  Size size;
  Frames frames;
  Rows x, y, r;
  Table gate;
};

struct GatedResidualBackward {  // dy = gate * dr
  Size size;
  Frames frames;
  Rows dr, y, dy;
  Table gate;
  RowSums dgate;  // of dr * y
};

struct RmsNormForward {
  Size size;
  Rows x, n;
  Table weight;
  float* rstd;
  float eps;
};

struct RmsNormBackward {
  Size size;
  Rows dn, x, dx;
  Table weight;
  const float* rstd;
  RowSums dweight;  // of dn * x * rstd
};

// Token t of a sequence is number first + t of a clip of frames * height * width tokens. Columns of a head are rotated
// by its frame, row and column as rope_split of kernels/reference.py says.
struct Rope {
  const float* cos;  // [P, head / 2], P at least frames, height and width
  const float* sin;
  std::int64_t head, frames, height, width, first;
};

// Index 0 is q, 1 is k.
struct QkRopeForward {
  Size size;
  Rope rope;
  Rows in[2], out[2];  // may be the same memory
  Table weight[2];
  float* rstd[2];
  float eps;
};

struct QkRopeBackward {
  Size size;
  Rope rope;
  Rows dout[2], in[2], din[2];
  Table weight[2];
  const float* rstd[2];
  RowSums dweight[2];
};

// x, v, v_neg, out contiguous [B * C, F, pixels]; dsigma [F].
struct GuidedEulerStep {
  std::int64_t planes, frames, pixels;
  const void* x;
  const void* v;
  const void* v_neg;  // null: no guidance
  void* out;
  Type type, v_type;
  const float* dsigma;
  float guidance;
};

// out may be x.
struct Gelu {
  const void* x;
  void* out;
  Type type;
  std::int64_t numel;
};

// x: gelu's input. dx may be dy.
struct GeluBackward {
  const void* dy;
  const void* x;
  void* dx;
  Type type;
  std::int64_t numel;
};

// out[r] = weight x[r] + bias, each row by itself: the same bits whatever other rows there are. x [R, in] and out
// [R, features] float32, contiguous; weight [features, in], its rows weight.token apart.
struct LinearRows {
  std::int64_t rows, in, features;
  const float* x;
  Rows weight;
  Table bias;
  float* out;
};

// Pixels of C channels side by side at data + b * stride[0] + t * stride[1] + h * stride[2] + w * stride[3], strides in
// elements. data null: absent.
struct Pixels {
  void* data;
  std::int64_t stride[4];
};

// r = y + bias + x ; out = act(r / max(||r||, 1e-12) * sqrt(C) * gamma), where r and out are given. With `upsampled`,
// pixel (h, w) of r is channels (2 a + e) C .. of pixel (i + a, j + e) of y, h = 2 i + a, w = 2 j + e. r may be x or y.
// Unlike all else, out in bf16 is approximated (to a tenth of what rounding costs), and of two equally near takes the
// larger one.
struct VaeAct {
  Type type;
  std::int64_t size[4];  // B, T, H, W of r and out
  std::int64_t channels;
  Pixels y, x, r, out;
  Table gamma, bias;
  bool silu, upsampled;
};

#define PUSA_ROW_KERNELS(DO)                         \
  DO(residual_norm_forward, ResidualNormForward)     \
  DO(residual_norm_backward, ResidualNormBackward)   \
  DO(gated_residual_forward, GatedResidualForward)   \
  DO(gated_residual_backward, GatedResidualBackward) \
  DO(rms_norm_forward, RmsNormForward)               \
  DO(rms_norm_backward, RmsNormBackward)             \
  DO(qk_rope_forward, QkRopeForward)                 \
  DO(qk_rope_backward, QkRopeBackward)               \
  DO(guided_euler_step, GuidedEulerStep)             \
  DO(gelu, Gelu)                                     \
  DO(gelu_backward, GeluBackward)                    \
  DO(linear_rows, LinearRows)                        \
  DO(vae_act, VaeAct)

// Entry points: the best kernel for this processor (or the one asked for), on at most `threads` threads. Shapes and
// memory are trusted. Throw std::invalid_argument if PUSA_NATIVE_ISA is wrong.
#define PUSA_RUN(name, Args) void run(Args args, int threads);
PUSA_ROW_KERNELS(PUSA_RUN)
#undef PUSA_RUN

// Instruction sets: "base", "avx2" (with FMA), "avx512" (F and BW). The widest usable one serves, or the one named by
// the environment variable PUSA_NATIVE_ISA. Both throw std::invalid_argument for a name that is unknown or unusable
// here.
const char* isa();
void set_isa(const char* name);

constexpr int kIsas = 3;
int current_isa();                              // index of the one in use; throws as above
bool isa_usable(int index, const char** name);  // index 0 .. kIsas - 1, narrowest first

// What follows is implemented once per instruction set: row_norm.cpp, row_rope.cpp, row_pointwise.cpp, row_vae_act.cpp.
// A kernel works on rows (or planes, pixels, elements) first .. last, and its sums over them go to index `block` of the
// partials. `scratch` holds kScratchRows rows of D + 64 floats, aligned to 64 bytes.
struct Span {
  std::int64_t first, last, block;
};

constexpr int kScratchRows = 5;
constexpr int kPixelRows = 18;  // of vae_act: 16 pixels, two tables

#define PUSA_DECLARE(name, Args) void name(const Args& args, Span span, float* scratch);
namespace base {
PUSA_ROW_KERNELS(PUSA_DECLARE)
}
namespace avx2 {
PUSA_ROW_KERNELS(PUSA_DECLARE)
}
namespace avx512 {
PUSA_ROW_KERNELS(PUSA_DECLARE)
}
#undef PUSA_DECLARE

}  // namespace pusa
