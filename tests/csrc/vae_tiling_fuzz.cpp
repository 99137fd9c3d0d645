// Random plans for the CPU's tiling, run under sanitizers by test_vae_tiling_native.py: `fuzz ISA ROUNDS`. Every buffer
// is exactly as long as what it holds, so that one element too far is seen.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "vae_tiling.hpp"

namespace pusa {
int chosen = 0;
int current_isa() { return chosen; }
}  // namespace pusa

namespace {

using pusa::Clip;
using pusa::Element;

std::mt19937_64 generator(20261123);

std::int64_t draw(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

std::int64_t size_of(Element type) { return type == Element::float32 ? 4 : (type == Element::uint8 ? 1 : 2); }

// A clip in memory of its own; `loose`: with gaps between pixels, rows and frames, but none at the end.
struct Owned {
  std::unique_ptr<char[]> memory;
  Clip clip;

  Owned(Element type, std::int64_t T, std::int64_t H, std::int64_t W, std::int64_t C, bool loose) {
    const std::int64_t pixel = C + (loose ? draw(0, 2) : 0), row = W * pixel + (loose ? draw(0, 3) : 0);
    const std::int64_t frame = H * row + (loose ? draw(0, 3) : 0);
    const std::int64_t bytes = ((T - 1) * frame + (H - 1) * row + (W - 1) * pixel + C) * size_of(type);
    memory.reset(new char[static_cast<std::size_t>(bytes)]);
    for (std::int64_t i = 0; i < bytes; ++i) memory[static_cast<std::size_t>(i)] = static_cast<char>(draw(0, 62));
    clip = {memory.get(), type, T, H, W, C, frame, row, pixel};
  }
};

[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

void round() {
  const std::int64_t H = draw(1, 40), W = draw(1, 40), T = draw(1, 3), C = draw(1, 5);
  const std::int64_t tile_h = draw(1, 45), tile_w = draw(1, 45), stride_h = draw(1, tile_h), stride_w = draw(1, tile_w);
  const auto type = static_cast<Element>(draw(0, 2)), out_type = static_cast<Element>(draw(0, 3));
  const std::int64_t border_h = tile_h - stride_h, border_w = draw(0, 60);
  const int threads = static_cast<int>(draw(1, 3));
  const auto plan = pusa::tile_plan(H, W, tile_h, tile_w, stride_h, stride_w);

  Owned sums(Element::float32, T, H, W, C, false), out(out_type, T, H, W, C, true), once(out_type, T, H, W, C, true);
  const Owned source(type, T, H, W, C, true);
  std::vector<float> weight(static_cast<std::size_t>(H * W), 0.0f);
  std::vector<Owned> tiles;
  std::vector<pusa::PlacedTile> placed;
  for (const pusa::TileSpan& span : plan) {
    tiles.emplace_back(type, T, span.bottom - span.top, span.right - span.left, C, false);
    const Clip& clip = tiles.back().clip;
    placed.push_back({clip, span.top, span.left});
    const pusa::TileBatch batch{clip, 0, 1, &span.top, &span.left};
    pusa::run(pusa::GatherTiles{batch, source.clip, size_of(type)}, threads);
    pusa::run(pusa::BlendTiles{batch, sums.clip, weight.data(), border_h, border_w}, threads);
  }
  for (const float w : weight) {
    if (!(w > 0)) fail("a pixel has no weight");
  }
  const bool clamp = draw(0, 1) == 1, nearest = draw(0, 1) == 1;
  pusa::run(pusa::FinishFrames{sums.clip, out.clip, weight.data(), clamp, nearest}, threads);
  pusa::run(placed, border_h, border_w, once.clip, clamp, nearest, threads);
  pusa::run(pusa::FinishFrames{source.clip, out.clip, nullptr, clamp, nearest}, threads);
  if (out_type != Element::uint8) return;
  // Tiles of one picture give it back.
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t y = 0; y < H; ++y) {
      for (std::int64_t x = 0; x < W; ++x) {
        for (std::int64_t c = 0; c < C; ++c) {
          const auto level = [&](const Clip& clip) {
            return int{static_cast<const std::uint8_t*>(clip.data)[t * clip.frame + y * clip.row + x * clip.pixel + c]};
          };
          if (std::abs(level(out.clip) - level(once.clip)) > 1) fail("a picture did not come back");
        }
      }
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  pusa::chosen = std::atoi(arguments[1]);
  for (int i = std::atoi(arguments[2]); i > 0; --i) round();
  std::printf("all well\n");
}
