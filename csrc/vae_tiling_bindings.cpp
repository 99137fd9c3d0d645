// The VAE's tiling as functions of pusa_fast._native, on tensors of the CPU and, where built, of CUDA: checks every
// argument against every other, so that none can make a kernel read or write outside its memory, then runs without the
// GIL.
#include "vae_tiling_bindings.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
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

std::int64_t integer(const std::string& name, py::handle value, std::int64_t least) {
  const std::string wanted =
      name + " must be an integer of " + std::to_string(least) + " or more that fits into 64 bits, got ";
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();  // TypeError
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) throw std::invalid_argument(wanted + (overflow > 0 ? "more" : "less"));
  if (found < least) throw std::invalid_argument(wanted + std::to_string(found));
  return found;
}

std::vector<std::int64_t> places(const char* name, py::handle values, std::int64_t count) {
  const auto list = values.cast<py::sequence>();
  if (static_cast<std::int64_t>(list.size()) != count) {
    throw std::invalid_argument(std::string(name) + " must have one entry for each of " + std::to_string(count) +
                                " tiles, got " + std::to_string(list.size()));
  }
  std::vector<std::int64_t> found;
  for (const py::handle value : list) found.push_back(integer(name, value, 0));
  return found;
}

void require_inside(const char* name, std::int64_t start, std::int64_t size, std::int64_t length) {
  if (size <= length && start <= length - size) return;
  throw std::invalid_argument(std::string(name) + " must keep a tile of " + std::to_string(size) + " inside " +
                              std::to_string(length) + " pixels, got " + std::to_string(start));
}

// Where the tiles lie in a picture; kept while a TileBatch points to it.
class Places {
 public:
  Places(py::handle tops, py::handle lefts, std::int64_t count)
      : tops_(places("tops", tops, count)), lefts_(places("lefts", lefts, count)) {
    std::vector<std::pair<std::int64_t, std::int64_t>> corners;
    for (std::size_t n = 0; n < tops_.size(); ++n) corners.emplace_back(tops_[n], lefts_[n]);
    std::sort(corners.begin(), corners.end());
    const auto twice = std::adjacent_find(corners.begin(), corners.end());
    if (twice == corners.end()) return;
    throw std::invalid_argument("tops and lefts must name each tile once, got (" + std::to_string(twice->first) + ", " +
                                std::to_string(twice->second) + ") twice");
  }

  PlacedTile tile(std::size_t n, const Clip& tile, const Clip& picture) const {
    require_inside("tops", tops_[n], tile.height, picture.height);
    require_inside("lefts", lefts_[n], tile.width, picture.width);
    return {tile, tops_[n], lefts_[n]};
  }

  TileBatch batch(const TensorView& tiles, const Clip& first, const Clip& picture) const {
    for (std::size_t n = 0; n < tops_.size(); ++n) tile(n, first, picture);
    return {first, tiles.stride(0), tiles.size(0), tops_.data(), lefts_.data()};
  }

 private:
  std::vector<std::int64_t> tops_, lefts_;
};

Element element(const TensorView& x, bool with_uint8) {
  if (x.is_float32()) return Element::float32;
  if (x.is_bfloat16()) return Element::bfloat16;
  if (x.is_float16()) return Element::float16;
  if (with_uint8 && x.is_uint8()) return Element::uint8;
  x.fail(with_uint8 ? "must be uint8, float32, bfloat16 or float16" : "must be float32, bfloat16 or float16",
         x.dtype());
}

// The last four axes.
Clip clip(const TensorView& x, int rank, Element type) {
  x.require_rank(rank);
  x.require_addressable();
  x.require_unit_last_stride();
  const int t = rank - 4;
  const std::int64_t channels = x.size(t + 3), pixel = x.size(t + 2) > 1 ? x.stride(t + 2) : channels;
  return {x.data(), type, x.size(t), x.size(t + 1), x.size(t + 2), channels, x.stride(t), x.stride(t + 1), pixel};
}

void require_not_empty(const TensorView& x, int first_axis) {
  for (int i = first_axis; i < x.ndim(); ++i) {
    if (x.size(i) < 1) x.fail("must have at least one frame, pixel and channel", "shape " + x.shape());
  }
}

void require_packed(const TensorView& x, const Clip& found) {
  if (found.pixel != found.channels)
    x.fail("must have its pixels side by side", "a stride of " + std::to_string(found.pixel));
}

void require_same(const TensorView& x, const char* what, std::int64_t found, const TensorView& other,
                  std::int64_t wanted) {
  if (found != wanted) {
    x.fail(std::string("must have the ") + what + " of " + other.name() + ", " + std::to_string(wanted),
           std::to_string(found));
  }
}

void require_output(const TensorView& x, std::initializer_list<const TensorView*> others) {
  x.require_no_self_overlap();
  for (const TensorView* other : others) x.require_apart(*other);
}

float* weights(const TensorView& weight, const TensorView& acc) {
  if (!weight.is_float32()) weight.fail("must be float32", weight.dtype());
  weight.require_device(acc);
  weight.require_shape({acc.size(1), acc.size(2)});
  weight.require_addressable();
  weight.require_contiguous();
  return static_cast<float*>(weight.data());
}

int thread_count(py::handle threads) {
  return checked_threads(static_cast<int>(std::min<std::int64_t>(integer("threads", threads, 1), 1024)));
}

template <class Args>
void launch(const Args& args, const TensorView& on, py::handle threads_, py::handle stream_) {
  const int threads = thread_count(threads_);
  const auto stream = static_cast<std::uintptr_t>(integer("stream", stream_, 0));
  if (on.is_cpu() && stream != 0)
    throw std::invalid_argument("stream must be 0 on the CPU, got " + std::to_string(stream));
  const py::gil_scoped_release unlocked;
#ifdef PUSA_CUDA
  if (on.is_cuda()) return cuda::run(args, on.device(), reinterpret_cast<void*>(stream));
#endif
  run(args, threads);
}

py::list plan(py::handle height, py::handle width, py::handle tile_h, py::handle tile_w, py::handle stride_h,
              py::handle stride_w) {
  const std::vector<TileSpan> spans =
      tile_plan(integer("height", height, 1), integer("width", width, 1), integer("tile_h", tile_h, 1),
                integer("tile_w", tile_w, 1), integer("stride_h", stride_h, 1), integer("stride_w", stride_w, 1));
  py::list found;
  for (const TileSpan& span : spans) found.append(py::make_tuple(span.top, span.bottom, span.left, span.right));
  return found;
}

void gather_tiles(py::handle source_, py::handle tiles_, py::handle tops, py::handle lefts, py::handle threads,
                  py::handle stream) {
  const TensorView source("source", source_, kMemory), tiles("tiles", tiles_, kMemory);
  tiles.require_device(source);
  const std::int64_t size = source.itemsize();
  if (size != 1 && size != 2 && size != 4 && size != 8)
    source.fail("must have elements of 1, 2, 4 or 8 bytes", source.dtype());
  if (!tiles.same_dtype(source)) tiles.fail("must have the dtype of source, " + source.dtype(), tiles.dtype());
  const Clip from = clip(source, 4, Element::uint8), tile = clip(tiles, 5, Element::uint8);
  tiles.require_contiguous();
  require_same(tiles, "frames", tile.frames, source, from.frames);
  require_same(tiles, "channels", tile.channels, source, from.channels);
  const Places where(tops, lefts, tiles.size(0));
  if (tiles.size(0) == 0) return;
  require_not_empty(tiles, 1);
  require_output(tiles, {&source});
  launch(GatherTiles{where.batch(tiles, tile, from), from, size}, tiles, threads, stream);
}

void blend_tiles(py::handle tiles_, py::handle acc_, py::handle weight_, py::handle tops, py::handle lefts,
                 py::handle border_h, py::handle border_w, py::handle threads, py::handle stream) {
  const TensorView tiles("tiles", tiles_, kMemory), acc("acc", acc_, kMemory), weight("weight", weight_, kMemory);
  acc.require_device(tiles);
  if (!acc.is_float32()) acc.fail("must be float32", acc.dtype());
  const Clip tile = clip(tiles, 5, element(tiles, false)), sum = clip(acc, 4, Element::float32);
  require_same(tiles, "frames", tile.frames, acc, sum.frames);
  require_same(tiles, "channels", tile.channels, acc, sum.channels);
  require_not_empty(acc, 0);
  require_packed(acc, sum);
  const Places where(tops, lefts, tiles.size(0));
  float* const weight_sums = weights(weight, acc);
  const std::int64_t down = integer("border_h", border_h, 0), across = integer("border_w", border_w, 0);
  if (tiles.size(0) == 0) return;
  require_not_empty(tiles, 1);
  require_packed(tiles, tile);
  require_output(acc, {&tiles, &weight});
  require_output(weight, {&tiles});
  launch(BlendTiles{where.batch(tiles, tile, sum), sum, weight_sums, down, across}, acc, threads, stream);
}

void finish_frames(py::handle acc_, py::handle weight_, py::handle out_, bool clamp, bool round, py::handle threads,
                   py::handle stream) {
  const TensorView acc("acc", acc_, kMemory), out("out", out_, kMemory);
  const Optional weight = weight_.is_none() ? std::nullopt : Optional(std::in_place, "weight", weight_, kMemory);
  out.require_device(acc);
  const Clip from = clip(acc, 4, element(acc, false)), to = clip(out, 4, element(out, true));
  out.require_shape({from.frames, from.height, from.width, from.channels});
  const float* const weight_sums = weight ? weights(*weight, acc) : nullptr;
  require_output(out, {&acc});
  if (weight) out.require_apart(*weight);
  if (out.empty()) return;
  launch(FinishFrames{from, to, weight_sums, clamp, round}, out, threads, stream);
}

void finish_tiles(py::handle tiles_, py::handle tops, py::handle lefts, py::handle border_h, py::handle border_w,
                  py::handle out_, bool clamp, bool round, py::handle threads_) {
  const TensorView out("out", out_);
  const Clip to = clip(out, 4, element(out, true));
  std::vector<TensorView> views;
  for (const py::handle tile : tiles_.cast<py::sequence>()) views.emplace_back("a tile", tile);
  if (views.empty()) throw std::invalid_argument("tiles must hold at least one tile, got none");
  const Places where(tops, lefts, static_cast<std::int64_t>(views.size()));
  require_not_empty(out, 0);
  require_output(out, {});
  std::vector<PlacedTile> tiles;
  for (const TensorView& view : views) {
    const Clip tile = clip(view, 4, element(view, false));
    if (!view.same_dtype(views[0])) view.fail("must have the dtype of the others, " + views[0].dtype(), view.dtype());
    require_same(view, "frames", tile.frames, out, to.frames);
    require_same(view, "channels", tile.channels, out, to.channels);
    require_not_empty(view, 0);
    require_packed(view, tile);
    out.require_apart(view);
    tiles.push_back(where.tile(tiles.size(), tile, to));
  }
  const std::int64_t down = integer("border_h", border_h, 0), across = integer("border_w", border_w, 0);
  const int threads = thread_count(threads_);
  const py::gil_scoped_release unlocked;
  run(tiles, down, across, to, clamp, round, threads);
}

}  // namespace

void bind_vae_tiling(py::module_& m) {
  m.def("tile_plan", &plan,
        "(top, bottom, left, right) of each tile, row by row. ValueError: sizes that make no plan.");
  m.def("gather_tiles", &gather_tiles);
  m.def("blend_tiles", &blend_tiles);
  m.def("finish_frames", &finish_frames);
  m.def("finish_tiles", &finish_tiles);
}

}  // namespace pusa
