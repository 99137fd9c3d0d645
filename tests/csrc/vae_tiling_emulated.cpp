// The CUDA half of the tiling, compiled against tests/cuda_on_cpu and run beside the CPU's own on random arguments:
// `emulated ROUNDS`. The same bits are expected of both, and every buffer is exactly as long as what it holds.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "vae_tiling.hpp"

namespace pusa {
int current_isa() { return 0; }
}  // namespace pusa

namespace {

using pusa::Clip;
using pusa::Element;

std::mt19937_64 generator(20261123);

std::int64_t draw(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

std::int64_t size_of(Element type) { return type == Element::float32 ? 4 : (type == Element::uint8 ? 1 : 2); }

// [N, T, H, W, C] with gaps if `loose`, and none at the end. Two of the same shape hold the same.
struct Array {
  std::vector<char> memory;
  Clip clip;
  std::int64_t step;

  Array(Element type, std::int64_t N, std::int64_t T, std::int64_t H, std::int64_t W, std::int64_t C, bool loose) {
    const std::int64_t pixel = C + (loose ? draw(0, 2) : 0), row = W * pixel + (loose ? draw(0, 3) : 0);
    const std::int64_t frame = H * row + (loose ? draw(0, 3) : 0);
    step = T * frame;
    memory.resize(static_cast<std::size_t>(((N - 1) * step + (T - 1) * frame + (H - 1) * row + (W - 1) * pixel + C) *
                                           size_of(type)));
    memory.shrink_to_fit();
    for (char& byte : memory) byte = static_cast<char>(draw(0, 62));
    clip = {memory.data(), type, T, H, W, C, frame, row, pixel};
  }
  Array(const Array& other) : memory(other.memory), clip(other.clip), step(other.step) { clip.data = memory.data(); }
};

void same(const void* a, const void* b, std::size_t bytes, const char* what) {
  if (std::memcmp(a, b, bytes) != 0) {
    std::printf("%s: CPU and CUDA differ\n", what);
    std::exit(1);
  }
}

void round() {
  const std::int64_t unit = draw(0, 1) ? 8 : 1;  // sizes for wide accesses, half the time
  const std::int64_t T = draw(1, 3), C = draw(0, 3) ? 3 : draw(1, 16);
  const std::int64_t th = draw(1, 6), tw = draw(1, 12) * unit, H = th + draw(0, 9), W = tw + draw(0, 25) * unit;
  std::set<std::pair<std::int64_t, std::int64_t>> places;
  for (std::int64_t n = draw(0, 4) ? draw(1, 6) : 200; n > 0; --n)
    places.insert({draw(0, H - th), draw(0, (W - tw) / unit) * unit});
  std::vector<std::int64_t> tops, lefts;
  for (const auto& [top, left] : places) {
    tops.push_back(top);
    lefts.push_back(left);
  }
  const auto N = static_cast<std::int64_t>(places.size());
  const auto batch = [&](const Array& tiles) {
    return pusa::TileBatch{tiles.clip, tiles.step, N, tops.data(), lefts.data()};
  };

  const auto type = static_cast<Element>(draw(0, 2)), out_type = static_cast<Element>(draw(0, 3));
  const Array source(type, 1, T, H, W, C, draw(0, 1) == 1);
  Array tiles(type, N, T, th, tw, C, false), tiles2(tiles);
  pusa::run(pusa::GatherTiles{batch(tiles), source.clip, size_of(type)}, 1);
  pusa::cuda::run(pusa::GatherTiles{batch(tiles2), source.clip, size_of(type)}, 0, nullptr);
  same(tiles.memory.data(), tiles2.memory.data(), tiles.memory.size(), "gather");

  Array sums(Element::float32, 1, T, H, W, C, false), sums2(sums);
  std::vector<float> weight(static_cast<std::size_t>(H * W), 0.0f);
  for (float& w : weight) w = static_cast<float>(draw(0, 1));  // some pixels were there before
  std::vector<float> weight2(weight);
  const std::int64_t down = draw(0, 8), across = draw(0, 90);
  pusa::run(pusa::BlendTiles{batch(tiles), sums.clip, weight.data(), down, across}, 1);
  pusa::cuda::run(pusa::BlendTiles{batch(tiles), sums2.clip, weight2.data(), down, across}, 0, nullptr);
  same(weight.data(), weight2.data(), weight.size() * sizeof(float), "weight");
  same(sums.memory.data(), sums2.memory.data(), sums.memory.size(), "blend");

  Array out(out_type, 1, T, H, W, C, draw(0, 1) == 1), out2(out);
  const bool clamp = draw(0, 1) == 1, nearest = draw(0, 1) == 1, from_sums = draw(0, 1) == 1;
  for (float& w : weight) w = w == 0.0f ? 1.0f : w;
  const pusa::FinishFrames args{from_sums ? sums.clip : source.clip, out.clip, draw(0, 1) ? weight.data() : nullptr,
                                clamp, nearest};
  pusa::FinishFrames args2 = args;
  args2.out = out2.clip;
  pusa::run(args, 1);
  pusa::cuda::run(args2, 0, nullptr);
  same(out.memory.data(), out2.memory.data(), out.memory.size(), "finish");
}

}  // namespace

int main(int, char** arguments) {
  for (int i = std::atoi(arguments[1]); i > 0; --i) round();
  std::printf("all well\n");
}
