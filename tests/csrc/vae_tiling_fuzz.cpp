// Random boxes of random tiles, run under sanitizers by test_vae_tiling_builds.py: `fuzz ISA ROUNDS`. Every buffer is
// exactly as long as what it holds, so that one element too far is seen. Where PUSA_EMULATED is defined, results are
// compared to the bit with those of the CUDA kernel, compiled against cuda_on_cpu.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "vae_tiling.hpp"

namespace pusa {
int chosen = 0;
int current_isa() { return chosen; }
}  // namespace pusa

namespace {

using pusa::Element;

std::mt19937_64 generator(20261123);

std::int64_t draw(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

std::int64_t size_of(Element type) { return type == Element::float32 ? 4 : (type == Element::uint8 ? 1 : 2); }

// [T, H, W, C] of numbers, with gaps between rows and frames, and none at the end.
struct Array {
  std::int64_t frame, row;
  std::vector<char> memory;

  Array(Element type, std::int64_t T, std::int64_t H, std::int64_t W, std::int64_t C) {
    row = W * C + draw(0, 3);
    frame = H * row + draw(0, 3);
    memory.resize(static_cast<std::size_t>(((T - 1) * frame + (H - 1) * row + W * C) * size_of(type)));
    memory.shrink_to_fit();
    for (char& byte : memory) byte = static_cast<char>(draw(0, 62));
  }
};

void round() {
  pusa::BlendBox a{};
  a.type = static_cast<Element>(draw(0, 2));
  a.out_type = static_cast<Element>(draw(0, 3));
  a.frames = draw(0, 9) ? draw(1, 3) : 33;  // more than share a task
  a.channels = draw(0, 2) ? 3 : draw(1, 16);
  a.picture_height = draw(1, 20);
  a.picture_width = draw(1, 40);
  a.border_h = draw(0, 8);
  a.border_w = draw(0, 60);
  a.height = draw(1, a.picture_height);
  a.width = draw(1, a.picture_width);
  a.top = draw(0, a.picture_height - a.height);
  a.left = draw(0, a.picture_width - a.width);
  a.clamp = draw(0, 1) == 1;
  a.round = draw(0, 1) == 1;
  std::vector<Array> arrays;
  for (std::int64_t n = draw(0, 9) ? draw(1, 6) : pusa::kMostTiles; n > 0; --n) {
    const std::int64_t height = draw(1, a.picture_height), width = draw(1, a.picture_width);
    const Array& array = arrays.emplace_back(a.type, a.frames, height, width, a.channels);
    a.tiles[a.count++] = {array.memory.data(),
                          array.frame,
                          array.row,
                          draw(0, a.picture_height - height),
                          draw(0, a.picture_width - width),
                          height,
                          width};
  }
  Array out(a.out_type, a.frames, a.height, a.width, a.channels);
  a.frame = out.frame;
  a.row = out.row;
#if defined(PUSA_EMULATED)
  Array other(out);
  a.out = other.memory.data();
  pusa::cuda::run(a, 0, nullptr);
#endif
  a.out = out.memory.data();
  pusa::run(a, static_cast<int>(draw(1, 3)));
#if defined(PUSA_EMULATED)
  if (out.memory != other.memory) {
    std::printf("CPU and CUDA differ\n");
    std::exit(1);
  }
#endif
}

}  // namespace

int main(int, char** arguments) {
  pusa::chosen = std::atoi(arguments[1]);
  for (int i = std::atoi(arguments[2]); i > 0; --i) round();
  std::printf("all well\n");
}
