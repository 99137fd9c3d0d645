// Random boxes of random tiles, run under sanitizers by test_vae_tiling_native.py: `fuzz ISA ROUNDS`. Every buffer is
// exactly as long as what it holds, so that one element too far is seen. Results are compared with the definition, and
// where PUSA_EMULATED is defined, bit for bit with those of the CUDA kernel, compiled against cuda_on_cpu.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

// [T, H, W, C] with gaps between rows and frames, and none at the end; its values are `number` of 0 .. 62.
struct Array {
  Element type;
  std::int64_t frame, row;
  std::vector<char> memory;

  Array(Element type_, std::int64_t T, std::int64_t H, std::int64_t W, std::int64_t C) : type(type_) {
    row = W * C + draw(0, 3);
    frame = H * row + draw(0, 3);
    memory.resize(static_cast<std::size_t>(((T - 1) * frame + (H - 1) * row + W * C) * size_of(type)));
    memory.shrink_to_fit();
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(memory.size()) / size_of(type); ++i) set(i, draw(-16, 16));
  }

  // Multiples of 1/16, exact in every type.
  void set(std::int64_t i, std::int64_t sixteenths) {
    const float value = static_cast<float>(sixteenths) / 16;
    const _Float16 half = static_cast<_Float16>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto upper = static_cast<std::uint16_t>(bits >> 16);
    const auto level = static_cast<std::uint8_t>(sixteenths + 16);
    const void* from = type == Element::float32
                           ? static_cast<const void*>(&value)
                           : (type == Element::float16 ? static_cast<const void*>(&half)
                                                       : (type == Element::uint8 ? static_cast<const void*>(&level)
                                                                                 : static_cast<const void*>(&upper)));
    std::memcpy(memory.data() + i * size_of(type), from, static_cast<std::size_t>(size_of(type)));
  }

  double get(std::int64_t i) const {
    const char* at = memory.data() + i * size_of(type);
    float value;
    _Float16 half;
    std::uint16_t upper;
    if (type == Element::uint8) return static_cast<std::uint8_t>(*at);
    if (type == Element::float32) return std::memcpy(&value, at, 4), value;
    if (type == Element::float16) return std::memcpy(&half, at, 2), static_cast<double>(half);
    std::memcpy(&upper, at, 2);
    const std::uint32_t bits = std::uint32_t{upper} << 16;
    return std::memcpy(&value, &bits, 4), value;
  }
};

double weight(std::int64_t i, std::int64_t size, std::int64_t start, std::int64_t length, std::int64_t border) {
  if (start + size < length && size - i <= border) return static_cast<double>(size - i) / static_cast<double>(border);
  return start > 0 && i < border ? static_cast<double>(i + 1) / static_cast<double>(border) : 1.0;
}

[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

void compare(const pusa::BlendBox& a, const std::vector<Array>& arrays, const Array& out) {
  for (std::int64_t n = 0; n < a.frames * a.height * a.width * a.channels; ++n) {
    const std::int64_t c = n % a.channels, x = n / a.channels % a.width;
    const std::int64_t y = n / a.channels / a.width % a.height, t = n / a.channels / a.width / a.height;
    double sum = 0, total = 0;
    for (int k = 0; k < a.count; ++k) {
      const pusa::Tile& tile = a.tiles[k];
      const std::int64_t i = a.top + y - tile.top, j = a.left + x - tile.left;
      if (i < 0 || j < 0 || i >= tile.height || j >= tile.width) continue;
      const double mask = std::min(weight(i, tile.height, tile.top, a.picture_height, a.border_h),
                                   weight(j, tile.width, tile.left, a.picture_width, a.border_w));
      sum += mask * arrays[static_cast<std::size_t>(k)].get(t * tile.frame + i * tile.row + j * a.channels + c);
      total += mask;
    }
    const double found = out.get(t * a.frame + y * a.row + x * a.channels + c), wanted = sum / total;
    const bool levels = a.out_type == Element::uint8;
    if (total == 0) {
      if (levels ? found != 0 : !std::isnan(found)) fail("a pixel of no tile has a value");
    } else if (levels ? std::abs(found - (wanted + 1) * 127.5) > 1.001 : std::abs(found - wanted) > 0.005) {
      fail("a value is not that of the definition");
    }
  }
}

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
    a.tiles[a.count++] = {array.memory.data(), array.frame, array.row, draw(0, a.picture_height - height),
                          draw(0, a.picture_width - width), height, width};
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
  compare(a, arrays, out);
#if defined(PUSA_EMULATED)
  if (out.memory != other.memory) fail("CPU and CUDA differ");
#endif
}

}  // namespace

int main(int, char** arguments) {
  pusa::chosen = std::atoi(arguments[1]);
  for (int i = std::atoi(arguments[2]); i > 0; --i) round();
  std::printf("all well\n");
}
