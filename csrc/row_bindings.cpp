// The row kernels as functions of pusa_fast._native: checks every tensor against every other, so that no argument can
// make a kernel read or write outside its memory, then runs without the GIL.
//
// Tensors are DLPack capsules or objects with __dlpack__; None where one may be absent. Outputs are made by the caller.
#include "row_bindings.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "row_arguments.hpp"

namespace py = pybind11;

namespace pusa {
namespace {

template <class Args>
void release_and_run(const Args& args, int threads) {
  const int checked = checked_threads(threads);
  const py::gil_scoped_release unlocked;
  run(args, checked);
}

void residual_norm_forward(py::handle x_, py::handle y_, py::handle gate_, py::handle scale_, py::handle shift_,
                           py::handle weight_, py::handle bias_, py::handle r_, py::handle n_, py::handle mean_,
                           py::handle rstd_, float eps, std::int64_t tokens_per_frame, std::int64_t first_token,
                           int threads) {
  const TensorView x("x", x_), n("n", n_), mean("mean", mean_), rstd("rstd", rstd_);
  const Optional y = optional("y", y_), r = optional("r", r_), gate = optional("gate", gate_);
  const Optional scale = optional("scale", scale_), shift = optional("shift", shift_);
  const Optional weight = optional("weight", weight_), bias = optional("bias", bias_);
  require_together(y.has_value() == r.has_value() && (y || !gate), "r comes with y, and gate needs both");
  require_together(
      scale.has_value() == shift.has_value() && weight.has_value() == bias.has_value() && !(scale && weight),
      "give scale and shift, or weight and bias, or neither pair");
  const Size size = size_of(x);
  const Type type = type_of(x);
  ResidualNormForward args{};
  args.size = size;
  args.frames = frames({&gate, &scale, &shift}, size, tokens_per_frame, first_token);
  args.x = input(x, size);
  args.y = input(y, size);
  if (r) args.r = output(*r, size, type);
  args.n = output(n, size, type);
  args.gate = table(gate);
  args.affine = weight.has_value();
  args.scale = weight ? weight_row(*weight, size.width) : table(scale);
  args.shift = bias ? weight_row(*bias, size.width) : table(shift);
  args.mean = floats(mean, {size.batch, size.tokens});
  args.rstd = floats(rstd, {size.batch, size.tokens});
  args.eps = eps;
  release_and_run(args, threads);
}

void residual_norm_backward(py::handle dr_, py::handle dn_, py::handle r_, py::handle y_, py::handle gate_,
                            py::handle scale_, py::handle weight_, py::handle mean_, py::handle rstd_, py::handle dx_,
                            py::handle dy_, py::handle dgate_, py::handle dscale_, py::handle dshift_,
                            py::handle dweight_, py::handle dbias_, std::int64_t tokens_per_frame,
                            std::int64_t first_token, int threads) {
  const TensorView dn("dn", dn_), r("r", r_), mean("mean", mean_), rstd("rstd", rstd_), dx("dx", dx_);
  const Optional dr = optional("dr", dr_), y = optional("y", y_), gate = optional("gate", gate_);
  const Optional scale = optional("scale", scale_), weight = optional("weight", weight_);
  const Optional dy = optional("dy", dy_), dgate = optional("dgate", dgate_), dscale = optional("dscale", dscale_);
  const Optional dshift = optional("dshift", dshift_), dweight = optional("dweight", dweight_);
  const Optional dbias = optional("dbias", dbias_);
  require_together(gate.has_value() == dy.has_value(), "dy comes with gate");
  require_together(!dgate || (gate && y), "dgate needs gate and y");
  require_together(!(scale && weight), "give scale or weight, not both");
  require_together(dscale.has_value() == dshift.has_value() && (!dscale || scale),
                   "dscale and dshift need scale, and each other");
  require_together(dweight.has_value() == dbias.has_value() && (!dweight || weight),
                   "dweight and dbias need weight, and each other");
  const Size size = size_of(r);
  const Type type = type_of(r);
  ResidualNormBackward args{};
  args.size = size;
  args.frames = frames({&gate, &scale}, size, tokens_per_frame, first_token);
  args.r = input(r, size);
  args.dn = input(dn, size, type);
  args.dr = input(dr, size, type);
  args.y = input(y, size);
  if (!y) args.y.type = type;
  args.dx = output(dx, size, type);
  if (dy) args.dy = output(*dy, size, args.y.type);
  args.gate = table(gate);
  args.affine = weight.has_value();
  args.scale = weight ? weight_row(*weight, size.width) : table(scale);
  args.mean = floats(mean, {size.batch, size.tokens});
  args.rstd = floats(rstd, {size.batch, size.tokens});
  args.dgate = frame_sums(dgate, args.frames, size);
  args.dscale = weight ? all_sums(dweight, size.width) : frame_sums(dscale, args.frames, size);
  args.dshift = weight ? all_sums(dbias, size.width) : frame_sums(dshift, args.frames, size);
  release_and_run(args, threads);
}

void gated_residual_forward(py::handle x_, py::handle y_, py::handle gate_, py::handle r_,
                            std::int64_t tokens_per_frame, std::int64_t first_token, int threads) {
  const TensorView x("x", x_), y("y", y_), r("r", r_);
  const Optional gate = optional("gate", gate_);
  const Size size = size_of(x);
  release_and_run(GatedResidualForward{size, frames({&gate}, size, tokens_per_frame, first_token), input(x, size),
                                       input(y, size), output(r, size, type_of(x)), table(gate)},
                  threads);
}

void gated_residual_backward(py::handle dr_, py::handle y_, py::handle gate_, py::handle dy_, py::handle dgate_,
                             std::int64_t tokens_per_frame, std::int64_t first_token, int threads) {
  const TensorView dr("dr", dr_), dy("dy", dy_);
  const Optional y = optional("y", y_), gate = optional("gate", gate_), dgate = optional("dgate", dgate_);
  require_together(gate && (!dgate || y), "gate is needed, and y for dgate");
  const Size size = size_of(dr);
  GatedResidualBackward args{};
  args.size = size;
  args.frames = frames({&gate}, size, tokens_per_frame, first_token);
  args.dr = input(dr, size);
  args.y = input(y, size);
  if (!y) args.y.type = args.dr.type;
  args.dy = output(dy, size, args.y.type);
  args.gate = table(gate);
  args.dgate = frame_sums(dgate, args.frames, size);
  release_and_run(args, threads);
}

void rms_norm_forward(py::handle x_, py::handle weight_, py::handle n_, py::handle rstd_, float eps, int threads) {
  const TensorView x("x", x_), weight("weight", weight_), n("n", n_), rstd("rstd", rstd_);
  const Size size = size_of(x);
  release_and_run(RmsNormForward{size, input(x, size), output(n, size, type_of(x)), weight_row(weight, size.width),
                                 floats(rstd, {size.batch, size.tokens}), eps},
                  threads);
}

void rms_norm_backward(py::handle dn_, py::handle x_, py::handle weight_, py::handle rstd_, py::handle dx_,
                       py::handle dweight_, int threads) {
  const TensorView dn("dn", dn_), x("x", x_), weight("weight", weight_), rstd("rstd", rstd_), dx("dx", dx_);
  const Optional dweight = optional("dweight", dweight_);
  const Size size = size_of(x);
  const Type type = type_of(x);
  release_and_run(RmsNormBackward{size, input(dn, size, type), input(x, size), output(dx, size, type),
                                  weight_row(weight, size.width), floats(rstd, {size.batch, size.tokens}),
                                  all_sums(dweight, size.width)},
                  threads);
}

void qk_rope_forward(py::handle q_, py::handle k_, py::handle weight_q_, py::handle weight_k_, py::handle cos_,
                     py::handle sin_, py::handle q_out_, py::handle k_out_, py::handle rstd_q_, py::handle rstd_k_,
                     std::int64_t frames, std::int64_t height, std::int64_t width, std::int64_t first_token, float eps,
                     int threads) {
  const TensorView q("q", q_), k("k", k_), weight_q("weight_q", weight_q_), weight_k("weight_k", weight_k_);
  const TensorView cos("cos", cos_), sin("sin", sin_), q_out("q_out", q_out_), k_out("k_out", k_out_);
  const TensorView rstd_q("rstd_q", rstd_q_), rstd_k("rstd_k", rstd_k_);
  const Size size = size_of_heads(q);
  const Type type = type_of(q);
  const QkRopeForward args{size,
                           rope(cos, sin, frames, height, width, first_token, q),
                           {heads(q, q, type), heads(k, q, type)},
                           {heads(q_out, q, type), heads(k_out, q, type)},
                           {weight_row(weight_q, size.width), weight_row(weight_k, size.width)},
                           {floats(rstd_q, {size.batch, size.tokens}), floats(rstd_k, {size.batch, size.tokens})},
                           eps};
  if (size.width > 0) release_and_run(args, threads);
}

void qk_rope_backward(py::handle dq_, py::handle dk_, py::handle q_, py::handle k_, py::handle weight_q_,
                      py::handle weight_k_, py::handle cos_, py::handle sin_, py::handle rstd_q_, py::handle rstd_k_,
                      py::handle dq_in_, py::handle dk_in_, py::handle dweight_q_, py::handle dweight_k_,
                      std::int64_t frames, std::int64_t height, std::int64_t width, std::int64_t first_token,
                      int threads) {
  const TensorView dq("dq", dq_), dk("dk", dk_), q("q", q_), k("k", k_);
  const TensorView weight_q("weight_q", weight_q_), weight_k("weight_k", weight_k_), cos("cos", cos_), sin("sin", sin_);
  const TensorView rstd_q("rstd_q", rstd_q_), rstd_k("rstd_k", rstd_k_), dq_in("dq_in", dq_in_), dk_in("dk_in", dk_in_);
  const Optional dweight_q = optional("dweight_q", dweight_q_), dweight_k = optional("dweight_k", dweight_k_);
  require_together(dweight_q.has_value() == dweight_k.has_value(), "dweight_q and dweight_k go together");
  const Size size = size_of_heads(q);
  const Type type = type_of(q);
  const QkRopeBackward args{size,
                            rope(cos, sin, frames, height, width, first_token, q),
                            {heads(dq, q, type), heads(dk, q, type)},
                            {heads(q, q, type), heads(k, q, type)},
                            {heads(dq_in, q, type), heads(dk_in, q, type)},
                            {weight_row(weight_q, size.width), weight_row(weight_k, size.width)},
                            {floats(rstd_q, {size.batch, size.tokens}), floats(rstd_k, {size.batch, size.tokens})},
                            {all_sums(dweight_q, size.width), all_sums(dweight_k, size.width)}};
  if (size.width > 0) release_and_run(args, threads);
}

void guided_euler_step(py::handle x_, py::handle v_, py::handle v_neg_, py::handle dsigma_, py::handle out_,
                       float guidance, int threads) {
  const TensorView x("x", x_), v("v", v_), dsigma("dsigma", dsigma_), out("out", out_);
  const Optional v_neg = optional("v_neg", v_neg_);
  x.require_rank(5);
  const Type type = type_of(x), v_type = type_of(v);
  require_type(out, type);
  if (v_neg) require_type(*v_neg, v_type);
  for (const TensorView* t : {&x, &v, &out, v_neg ? &*v_neg : &v}) {
    t->require_shape({x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
    t->require_contiguous();
  }
  const std::int64_t frames = x.size(2), planes = x.size(0) * x.size(1) * frames, pixels = x.size(3) * x.size(4);
  const void* negative = v_neg ? v_neg->data() : nullptr;
  const GuidedEulerStep args{planes,   frames,     pixels, x.data(), v.data(),
                             negative, out.data(), type,   v_type,   floats(dsigma, {frames}),
                             guidance};
  if (pixels > 0) release_and_run(args, threads);
}

// `other` of as many elements as x and its dtype, both contiguous.
void* alike(const TensorView& x, const TensorView& other) {
  x.require_contiguous();
  other.require_contiguous();
  if (other.numel() != x.numel()) other.fail("must have as many elements as x", other.shape());
  require_type(other, type_of(x));
  return other.data();
}

void gelu(py::handle x_, py::handle out_, int threads) {
  const TensorView x("x", x_), out("out", out_);
  release_and_run(Gelu{x.data(), alike(x, out), type_of(x), x.numel()}, threads);
}

void gelu_backward(py::handle dy_, py::handle x_, py::handle dx_, int threads) {
  const TensorView dy("dy", dy_), x("x", x_), dx("dx", dx_);
  release_and_run(GeluBackward{alike(x, dy), x.data(), alike(x, dx), type_of(x), x.numel()}, threads);
}

void linear_rows(py::handle x_, py::handle weight_, py::handle bias_, py::handle out_, int threads) {
  const TensorView x("x", x_), weight("weight", weight_), out("out", out_);
  const Optional bias = optional("bias", bias_);
  x.require_rank(2);
  weight.require_rank(2);
  const std::int64_t rows = x.size(0), width = x.size(1), features = weight.size(0);
  weight.require_shape({features, width});
  weight.require_unit_last_stride();
  release_and_run(LinearRows{rows, width, features, floats(x, {rows, width}),
                             Rows{weight.data(), type_of(weight), 0, weight.stride(0)},
                             bias ? weight_row(*bias, features) : Table{}, floats(out, {rows, features})},
                  threads);
}

void vae_act(py::handle y_, py::handle gamma_, py::handle x_, py::handle bias_, py::handle r_, py::handle out_,
             bool silu, bool upsampled, int threads) {
  const TensorView y("y", y_);
  const Optional x = optional("x", x_), r = optional("r", r_), out = optional("out", out_);
  const Optional gamma = optional("gamma", gamma_), bias = optional("bias", bias_);
  require_together(r || out, "r, out or both are needed");
  require_together(!out || gamma, "out needs gamma");
  const TensorView& like = out ? *out : *r;
  like.require_rank(5);
  const std::int64_t B = like.size(0), T = like.size(1), H = like.size(2), W = like.size(3), C = like.size(4);
  require_together(!upsampled || (H % 2 == 0 && W % 2 == 0), "upsampled r and out must have even H and W");
  const Type type = type_of(y);
  const std::int64_t h = upsampled ? H / 2 + 1 : H, w = upsampled ? W / 2 + 1 : W, c = upsampled ? 4 * C : C;
  const VaeAct args{type,
                    {B, T, H, W},
                    C,
                    pixels(y, {B, T, h, w, c}, type),
                    pixels(x, {B, T, H, W, C}, type),
                    output_pixels(r, {B, T, H, W, C}, type),
                    output_pixels(out, {B, T, H, W, C}, type),
                    flat_row(gamma, C),
                    flat_row(bias, C),
                    silu,
                    upsampled};
  if (like.numel() > 0) release_and_run(args, threads);
}

py::list isas() {
  py::list names;
  for (int i = 0; i < kIsas; ++i) {
    const char* name = nullptr;
    if (isa_usable(i, &name)) names.append(name);
  }
  return names;
}

}  // namespace

void bind_row_ops(py::module_& m) {
  m.def("residual_norm_forward", &residual_norm_forward);
  m.def("residual_norm_backward", &residual_norm_backward);
  m.def("gated_residual_forward", &gated_residual_forward);
  m.def("gated_residual_backward", &gated_residual_backward);
  m.def("rms_norm_forward", &rms_norm_forward);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("qk_rope_forward", &qk_rope_forward);
  m.def("qk_rope_backward", &qk_rope_backward);
  m.def("guided_euler_step", &guided_euler_step);
  m.def("gelu", &gelu);
  m.def("gelu_backward", &gelu_backward);
  m.def("linear_rows", &linear_rows);
  m.def("vae_act", &vae_act);
  m.def("isas", &isas, "Instruction sets that the row kernels can use here, narrowest first.");
  m.def("isa", &isa, "The one in use: PUSA_NATIVE_ISA, else the widest. ValueError: that names none of isas().");
  m.def(
      "set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
      "Use this one from now on, in the whole process; for tests and measurements. ValueError: not one of isas().");
}

}  // namespace pusa
