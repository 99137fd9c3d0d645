// The tile plan, and how rows of pictures are shared out between threads on the CPU.
#include "vae_tiling.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "parallel.hpp"
#include "row_ops.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace {

struct Kernels {
#define PUSA_FIELD(name, Args) void (*name)(const Args&, RowSpan, float*);
  PUSA_PICTURE_KERNELS(PUSA_FIELD)
#undef PUSA_FIELD
};

#define PUSA_BASE(name, Args) &base::name,
#define PUSA_AVX2(name, Args) &avx2::name,
#define PUSA_AVX512(name, Args) &avx512::name,
constexpr Kernels kKernels[kIsas] = {
    {PUSA_PICTURE_KERNELS(PUSA_BASE)},
#if defined(PUSA_X86_KERNELS)
    {PUSA_PICTURE_KERNELS(PUSA_AVX2)},
    {PUSA_PICTURE_KERNELS(PUSA_AVX512)},
#endif
};

// Frames that share the preparation of a row; fewer elements than kTaskElements are not worth another thread.
constexpr std::int64_t kFrames = 32;
constexpr std::int64_t kTaskElements = 16'384;
constexpr std::int64_t kMostTiles = 1 << 20;

// kernel on rows top .. bottom of all frames of `picture`, in pieces that are the same for any number of threads.
template <class Args>
void run_rows(const Args& args, void (*kernel)(const Args&, RowSpan, float*), const Clip& picture, std::int64_t top,
              std::int64_t bottom, int threads) {
  const std::int64_t pieces = ceil_div(picture.frames, kFrames), tasks = (bottom - top) * pieces;
  const std::int64_t elements = (bottom - top) * picture.frames * picture.width * picture.channels;
  const auto useful = static_cast<int>(std::clamp<std::int64_t>(elements / kTaskElements, 1, threads));
  const std::int64_t scratch = kPictureRows * scratch_stride(picture.width * picture.channels);
  parallel(tasks, useful, scratch, [&](std::int64_t task, float* room) {
    const std::int64_t piece = task % pieces;
    kernel(args, {top + task / pieces, picture.frames * piece / pieces, picture.frames * (piece + 1) / pieces}, room);
  });
}

using Positions = std::vector<std::int64_t>;

// 0, `length` and the ends of the tiles along an axis, in order, none twice.
template <class Start, class Size>
Positions cuts(const std::vector<PlacedTile>& tiles, std::int64_t length, Start start, Size size) {
  Positions found{0, length};
  for (const PlacedTile& tile : tiles) {
    found.push_back(start(tile));
    found.push_back(start(tile) + size(tile));
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// Which tiles cover what: the picture cut into bands, at most kBandRows high, and each into segments.
struct Cover {
  static constexpr std::int64_t kBandRows = 64;

  std::vector<std::vector<float>> masks;  // of each tile, across, an element each
  std::vector<Term> terms;
  std::vector<Segment> segments;
  Positions starts{0};
  std::int64_t most_terms = 0;

  Cover(const std::vector<PlacedTile>& tiles, const Clip& out, std::int64_t border_w) {
    make_masks(tiles, out, border_w);
    const auto top = [](const PlacedTile& tile) { return tile.top; };
    const auto left = [](const PlacedTile& tile) { return tile.left; };
    const Positions rows = cuts(tiles, out.height, top, [](const PlacedTile& tile) { return tile.clip.height; });
    const Positions columns = cuts(tiles, out.width, left, [](const PlacedTile& tile) { return tile.clip.width; });
    for (std::size_t i = 0; i + 1 < rows.size(); ++i) {
      for (std::int64_t y = rows[i]; y < rows[i + 1]; y += kBandRows) {
        add_band(tiles, y, std::min(y + kBandRows, rows[i + 1]), columns, out.channels);
      }
    }
    const Term* next = terms.data();  // which moved while it grew
    for (Segment& segment : segments) {
      segment.terms = next;
      next += segment.count;
    }
  }

 private:
  void make_masks(const std::vector<PlacedTile>& tiles, const Clip& out, std::int64_t border_w) {
    std::map<std::pair<std::int64_t, std::int64_t>, std::size_t> known;
    for (const PlacedTile& tile : tiles) {
      const auto [place, is_new] = known.try_emplace({tile.left, tile.clip.width}, masks.size());
      mask_of_.push_back(place->second);
      if (!is_new) continue;
      std::vector<float>& mask = masks.emplace_back();
      for (std::int64_t i = 0; i < tile.clip.width * out.channels; ++i) {
        mask.push_back(ramp_at(tile.left + i / out.channels, tile.left, tile.clip.width, out.width, border_w));
      }
    }
  }

  void add_band(const std::vector<PlacedTile>& tiles, std::int64_t top, std::int64_t bottom, const Positions& columns,
                std::int64_t channels) {
    for (std::size_t j = 0; j + 1 < columns.size(); ++j) {
      Segment segment{top, bottom, columns[j] * channels, columns[j + 1] * channels, nullptr, 0};
      for (std::size_t n = 0; n < tiles.size(); ++n) {
        const PlacedTile& tile = tiles[n];
        if (top < tile.top || top >= tile.top + tile.clip.height) continue;
        if (columns[j] < tile.left || columns[j] >= tile.left + tile.clip.width) continue;
        const std::int64_t offset = (columns[j] - tile.left) * channels;
        terms.push_back({&tile, masks[mask_of_[n]].data() + offset, offset});
        ++segment.count;
      }
      segments.push_back(segment);
      most_terms = std::max(most_terms, segment.count);
    }
    starts.push_back(static_cast<std::int64_t>(segments.size()));
  }

  std::vector<std::size_t> mask_of_;
};

struct Axis {
  std::int64_t length, tile, stride;

  std::int64_t count() const { return length <= tile ? 1 : (length - tile - 1) / stride + 2; }
  std::int64_t start(std::int64_t i) const { return i * stride; }
  std::int64_t stop(std::int64_t i) const { return length - start(i) < tile ? length : start(i) + tile; }
};

Axis axis(const char* side, std::int64_t length, std::int64_t tile, std::int64_t stride) {
  const auto complain = [&](const std::string& wanted, std::int64_t got) {
    throw std::invalid_argument(std::string(side) + ": " + wanted + ", got " + std::to_string(got));
  };
  if (length < 1) complain("the picture must have at least 1 pixel", length);
  if (tile < 1) complain("a tile must have at least 1 pixel", tile);
  if (stride < 1) complain("the stride must be at least 1", stride);
  if (stride > tile) complain("the stride must be at most the tile, " + std::to_string(tile), stride);
  return {length, tile, stride};
}

}  // namespace

std::vector<TileSpan> tile_plan(std::int64_t height, std::int64_t width, std::int64_t tile_h, std::int64_t tile_w,
                                std::int64_t stride_h, std::int64_t stride_w) {
  const Axis rows = axis("height", height, tile_h, stride_h), columns = axis("width", width, tile_w, stride_w);
  const std::int64_t down = rows.count(), across = columns.count();
  if (down > kMostTiles || across > kMostTiles / down) {
    throw std::invalid_argument("the plan must have at most " + std::to_string(kMostTiles) + " tiles, got " +
                                std::to_string(down) + " x " + std::to_string(across) + ": use a larger stride");
  }
  std::vector<TileSpan> plan;
  plan.reserve(static_cast<std::size_t>(down * across));
  for (std::int64_t i = 0; i < down; ++i) {
    for (std::int64_t j = 0; j < across; ++j) {
      plan.push_back({rows.start(i), rows.stop(i), columns.start(j), columns.stop(j)});
    }
  }
  return plan;
}

void run(const GatherTiles& a, int threads) {
  const Clip &tile = a.batch.tile, &source = a.source;
  const std::int64_t rows = a.batch.count * tile.frames * tile.height, size = a.itemsize;
  const std::int64_t elements = rows * tile.width * tile.channels;
  const auto useful = static_cast<int>(std::clamp<std::int64_t>(elements / kTaskElements, 1, threads));
  const bool packed = source.pixel == tile.channels;
  const std::int64_t pieces = packed ? 1 : tile.width, piece = tile.channels * (packed ? tile.width : 1) * size;
  parallel(rows, useful, 0, [&](std::int64_t row, float*) {
    const std::int64_t n = row / (tile.frames * tile.height), t = row / tile.height % tile.frames,
                       y = row % tile.height;
    char* to = static_cast<char*>(tile.data) + (n * a.batch.step + t * tile.frame + y * tile.row) * size;
    const char* from = static_cast<const char*>(source.data) +
                       (t * source.frame + (a.batch.tops[n] + y) * source.row + a.batch.lefts[n] * source.pixel) * size;
    for (std::int64_t x = 0; x < pieces; ++x) {
      std::memcpy(to + x * piece, from + x * source.pixel * size, static_cast<std::size_t>(piece));
    }
  });
}

void run(const BlendTiles& a, int threads) {
  const TileBatch& batch = a.batch;
  if (batch.count == 0) return;
  const auto [highest, lowest] = std::minmax_element(batch.tops, batch.tops + batch.count);
  run_rows(a, kKernels[current_isa()].blend_row, a.acc, *highest, *lowest + batch.tile.height, threads);
  for (std::int64_t n = 0; n < batch.count; ++n) {
    const std::int64_t top = batch.tops[n], left = batch.lefts[n];
    for (std::int64_t y = top; y < top + batch.tile.height; ++y) {
      const float row = ramp_at(y, top, batch.tile.height, a.acc.height, a.border_h);
      for (std::int64_t x = left; x < left + batch.tile.width; ++x) {
        a.weight[y * a.acc.width + x] += smaller(row, ramp_at(x, left, batch.tile.width, a.acc.width, a.border_w));
      }
    }
  }
}

void run(const FinishFrames& a, int threads) {
  run_rows(a, kKernels[current_isa()].finish_row, a.acc, 0, a.acc.height, threads);
}

void run(const std::vector<PlacedTile>& tiles, std::int64_t border_h, std::int64_t border_w, const Clip& out,
         bool clamp, bool round, int threads) {
  const Cover cover(tiles, out, border_w);
  const FinishTiles args{out, tiles[0].clip.type, border_h, clamp, round, cover.segments.data(), cover.starts.data()};
  const auto kernel = kKernels[current_isa()].finish_tiles;
  const auto bands = static_cast<std::int64_t>(cover.starts.size()) - 1;
  const std::int64_t elements = out.frames * out.height * out.width * out.channels;
  const auto useful = static_cast<int>(std::clamp<std::int64_t>(elements / kTaskElements, 1, threads));
  const std::int64_t scratch = kPictureRows * scratch_stride(out.width * out.channels) + kTermFloats * cover.most_terms;
  parallel(bands * ceil_div(out.frames, kBandFrames), useful, scratch, [&](std::int64_t task, float* room) {
    const std::int64_t first = task / bands * kBandFrames;
    kernel(args, {task % bands, first, std::min(first + kBandFrames, out.frames)}, room);
  });
}

}  // namespace pusa
