// blend_box as a function of pusa_fast._native, on tensors of the CPU and, where built, of CUDA: checks every argument
// against every other, so that none can make the kernel read or write outside its memory, then runs without the GIL.
#include "vae_tiling_bindings.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "row_arguments.hpp"
#include "tensor_view.hpp"
#include "vae_tiling.hpp"

namespace py = pybind11;

namespace pusa {
namespace {

#ifdef PUSA_CUDA
constexpr Memory kMemory = Memory::cpu_or_cuda;
#else
constexpr Memory kMemory = Memory::cpu;
#endif

using Place = std::tuple<py::object, std::int64_t, std::int64_t>;  // a tile, its top and left
using Pair = std::tuple<std::int64_t, std::int64_t>;               // rows, columns

Element element(const TensorView& x) {
  if (x.is_float32()) return Element::float32;
  if (x.is_bfloat16()) return Element::bfloat16;
  if (x.is_float16()) return Element::float16;
  if (x.is_uint8()) return Element::uint8;
  x.fail("must be uint8, float32, bfloat16 or float16", x.dtype());
}

// [T, H, W, C] whose rows are contiguous.
void require_clip(const TensorView& x) {
  x.require_rank(4);
  x.require_addressable();
  x.require_unit_last_stride();
  if (x.size(2) > 1 && x.stride(2) != x.size(3))
    x.fail("must have contiguous rows", "a stride of " + std::to_string(x.stride(2)));
}

// 0 <= start <= length - size.
void require_inside(const char* what, std::int64_t start, std::int64_t size, std::int64_t length) {
  if (start >= 0 && size <= length && start <= length - size) return;
  throw std::invalid_argument(std::string(what) + " must lie inside the picture, got " + std::to_string(size) + " at " +
                              std::to_string(start) + " of " + std::to_string(length));
}

void blend_box(py::handle out_, const std::vector<Place>& places, const Pair& at, const Pair& picture,
               const Pair& borders, bool clamp, bool round, int threads, std::uintptr_t stream) {
  const TensorView out("out", out_, kMemory);
  if (places.empty() || places.size() > kMostTiles)
    throw std::invalid_argument("tiles must be 1 to 64, got " + std::to_string(places.size()));
  require_clip(out);
  out.require_no_self_overlap();
  BlendBox a{};
  a.out = out.data();
  a.out_type = element(out);
  a.frame = out.stride(0);
  a.row = out.stride(1);
  a.frames = out.size(0);
  a.height = out.size(1);
  a.width = out.size(2);
  a.channels = out.size(3);
  a.clamp = clamp;
  a.round = round;
  std::tie(a.top, a.left) = at;
  std::tie(a.picture_height, a.picture_width) = picture;
  std::tie(a.border_h, a.border_w) = borders;
  require_inside("the box's rows", a.top, a.height, a.picture_height);
  require_inside("the box's columns", a.left, a.width, a.picture_width);
  if (a.border_h < 0 || a.border_w < 0) throw std::invalid_argument("borders must be 0 or more");
  std::vector<TensorView> views;  // which keep the tiles' memory
  for (const auto& [source, top, left] : places) {
    const TensorView& tile = views.emplace_back("a tile", source, kMemory);
    tile.require_device(out);
    require_clip(tile);
    tile.require_shape({a.frames, tile.size(1), tile.size(2), a.channels});
    require_inside("a tile's rows", top, tile.size(1), a.picture_height);
    require_inside("a tile's columns", left, tile.size(2), a.picture_width);
    a.type = element(tile);
    if (a.type == Element::uint8 || !tile.same_dtype(views[0])) tile.fail("must be of one float dtype", tile.dtype());
    a.tiles[a.count++] = {tile.data(), tile.stride(0), tile.stride(1), top, left, tile.size(1), tile.size(2)};
  }
  threads = checked_threads(threads);
  if (out.empty()) return;
  const py::gil_scoped_release unlocked;
#ifdef PUSA_CUDA
  if (out.is_cuda()) return cuda::run(a, out.device(), reinterpret_cast<void*>(stream));
#endif
  (void)stream;
  run(a, threads);
}

}  // namespace

void bind_vae_tiling(py::module_& m) {
  m.def("blend_box", &blend_box,
        "(out, [(tile, top, left), ..], (top, left), (height, width), borders, clamp, round, threads, stream)");
}

}  // namespace pusa
