// The VAE's tiling on CUDA: one launch per batch of tiles, on the caller's stream. Blocks own what they write, and add
// tiles in their order, so results are the same every time and nothing is atomic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "vae_tiling.hpp"
#include "vae_tiling_math.hpp"

namespace pusa {
namespace cuda {
namespace {

#if !defined(PUSA_BLOCK_THREADS)  // fewer where threads are emulated
#define PUSA_BLOCK_THREADS 256
#endif
constexpr int kThreads = PUSA_BLOCK_THREADS;
constexpr int kPixels = 128;  // of a row, for a block that blends
constexpr int kPlaces = 64;   // tiles of a launch: they travel as its argument
constexpr std::int64_t kMostBlocks = 1 << 30;

using bf16 = __nv_bfloat16;
using f16 = __half;

struct Places {
  std::int64_t top[kPlaces], left[kPlaces];
  int count;
};

// V elements that lie together, moved with accesses of 16 bytes where they fill one.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T at[V];
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(x);
  } else {
    return static_cast<T>(x);
  }
}

// A block copies row after row; `Unit` is what a thread moves at once, `run` the units that lie together in the source.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather(Unit* tiles, const char* source, GatherTiles a, Places places, unsigned run, unsigned units) {
  const Clip& tile = a.batch.tile;
  const std::int64_t rows = places.count * tile.frames * tile.height;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int64_t y = row % tile.height, t = row / tile.height % tile.frames;
    const int n = static_cast<int>(row / tile.height / tile.frames);
    const char* from =
        source +
        (t * a.source.frame + (places.top[n] + y) * a.source.row + places.left[n] * a.source.pixel) * a.itemsize;
    for (unsigned i = threadIdx.x; i < units; i += kThreads) {
      const std::int64_t pixel = i / run;
      tiles[row * units + i] = reinterpret_cast<const Unit*>(from + pixel * a.source.pixel * a.itemsize)[i % run];
    }
  }
}

// A block owns kPixels pixels of a row in all frames: their weights are read, and written at the end, by nobody else.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    blend(BlendTiles a, Places places, std::int64_t top, std::int64_t first_segment, unsigned segments) {
  __shared__ float weight[kPixels], mask[kPixels];
  const Clip& tile = a.batch.tile;
  const int C = static_cast<int>(a.acc.channels);
  const std::int64_t y = top + blockIdx.x / segments;
  const std::int64_t x0 = (first_segment + blockIdx.x % segments) * kPixels;
  const int pixels = static_cast<int>(a.acc.width - x0 < kPixels ? a.acc.width - x0 : kPixels);
  float* const weight_row = a.weight + y * a.acc.width + x0;
  for (int p = threadIdx.x; p < pixels; p += kThreads) weight[p] = weight_row[p];
  const std::int64_t chunks = (static_cast<std::int64_t>(pixels) * C + V - 1) / V;
  for (int n = 0; n < places.count; ++n) {
    const std::int64_t left = places.left[n], y_tile = y - places.top[n];
    if (y_tile < 0 || y_tile >= tile.height || left >= x0 + pixels || left + tile.width <= x0) continue;
    const float row = ramp_at(y, places.top[n], tile.height, a.acc.height, a.border_h);
    for (int p = threadIdx.x; p < pixels; p += kThreads) {
      const bool inside = x0 + p >= left && x0 + p < left + tile.width;
      mask[p] = inside ? smaller(row, ramp_at(x0 + p, left, tile.width, a.acc.width, a.border_w)) : 0.0f;
    }
    __syncthreads();
    const T* const tile_row = static_cast<const T*>(tile.data) + n * a.batch.step + y_tile * tile.row + (x0 - left) * C;
    float* const acc_row = static_cast<float*>(a.acc.data) + y * a.acc.row + x0 * C;
    for (std::int64_t i = threadIdx.x; i < chunks * tile.frames; i += kThreads) {
      const std::int64_t t = i / chunks, e = (i - t * chunks) * V;
      int p = static_cast<int>(e / C), c = static_cast<int>(e - static_cast<std::int64_t>(p) * C);
      if (x0 + p < left || x0 + p >= left + tile.width) continue;  // chunks lie wholly inside a tile or outside it
      const auto values = *reinterpret_cast<const Pack<T, V>*>(tile_row + t * tile.frame + e);
      auto* const place = reinterpret_cast<Pack<float, V>*>(acc_row + t * a.acc.frame + e);
      Pack<float, V> sums = *place;  // where nothing was written yet, whatever it holds is passed over
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float part = mask[p] * wide(values.at[j]);
        sums.at[j] = weight[p] == 0.0f ? part : sums.at[j] + part;
        if (++c == C) {
          c = 0;
          ++p;
        }
      }
      *place = sums;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < pixels; p += kThreads) weight[p] += mask[p];
  }
  for (int p = threadIdx.x; p < pixels; p += kThreads) weight_row[p] = weight[p];
}

// A block finishes row after row. V > 1 only where pixels lie side by side on both sides.
template <class In, class Out, int V>
__global__ void __launch_bounds__(kThreads) finish(FinishFrames a) {
  const unsigned C = static_cast<unsigned>(a.acc.channels), chunks = static_cast<unsigned>(a.acc.width * C / V);
  for (std::int64_t row = blockIdx.x; row < a.acc.frames * a.acc.height; row += gridDim.x) {
    const std::int64_t t = row / a.acc.height, y = row - t * a.acc.height;
    const In* const in_row = static_cast<const In*>(a.acc.data) + t * a.acc.frame + y * a.acc.row;
    Out* const out_row = static_cast<Out*>(a.out.data) + t * a.out.frame + y * a.out.row;
    const float* const weight = a.weight ? a.weight + y * a.acc.width : nullptr;
    for (unsigned chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
      unsigned p = chunk * V / C, c = chunk * V - p * C;
      const auto values = *reinterpret_cast<const Pack<In, V>*>(in_row + p * a.acc.pixel + c);
      Pack<Out, V>* const place = reinterpret_cast<Pack<Out, V>*>(out_row + p * a.out.pixel + c);
      Pack<Out, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float v = wide(values.at[j]);
        if (weight) v = __fdiv_rn(v, weight[p]);
        if constexpr (std::is_same_v<Out, std::uint8_t>) {
          v = level(v, a.round);
        } else {
          v = a.clamp ? clamped(v) : v;
        }
        out.at[j] = narrow<Out>(v);
        if (++c == C) {
          c = 0;
          ++p;
        }
      }
      *place = out;
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class Current {
 public:
  explicit Current(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
  }
  ~Current() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0, device_;
};

template <class... Wanted, class... Given>
void launch(void (*kernel)(Wanted...), std::int64_t blocks, void* stream, Given... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, Wanted(args)...));
}

// call(places, the batch from its tile `first` on) for kPlaces tiles at a time.
template <class Call>
void in_launches(const TileBatch& batch, std::int64_t itemsize, Call call) {
  for (std::int64_t first = 0; first < batch.count; first += kPlaces) {
    Places places{};
    places.count = static_cast<int>(std::min<std::int64_t>(batch.count - first, kPlaces));
    std::copy_n(batch.tops + first, places.count, places.top);
    std::copy_n(batch.lefts + first, places.count, places.left);
    TileBatch rest = batch;
    rest.tile.data = static_cast<char*>(batch.tile.data) + first * batch.step * itemsize;
    call(places, rest);
  }
}

// The largest power of two, up to 16, that divides all: of addresses and distances in bytes.
std::int64_t common_alignment(std::initializer_list<std::int64_t> bytes) {
  std::int64_t all = 16;
  for (const std::int64_t value : bytes) all |= value;
  return all & -all;
}

std::int64_t address(const void* data) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data)); }

std::int64_t any_left(const Places& places) {  // has a bit where any of them has
  std::int64_t bits = 0;
  for (int n = 0; n < places.count; ++n) bits |= places.left[n] & -places.left[n];
  return bits;
}

std::int64_t size_of(Element type) { return type == Element::float32 ? 4 : (type == Element::uint8 ? 1 : 2); }

template <class Call>
void with_float(Element type, Call call) {
  if (type == Element::float32) {
    call(float{});
  } else if (type == Element::bfloat16) {
    call(bf16{});
  } else {
    call(f16{});
  }
}

template <class Unit>
void gather_units(const GatherTiles& a, const Places& places, void* stream) {
  const Clip& tile = a.batch.tile;
  const bool packed = a.source.pixel == tile.channels;
  const std::int64_t per_pixel = tile.channels * a.itemsize / static_cast<std::int64_t>(sizeof(Unit));
  const std::int64_t units = tile.width * tile.channels * a.itemsize / static_cast<std::int64_t>(sizeof(Unit));
  const std::int64_t rows = places.count * tile.frames * tile.height;
  launch(gather<Unit>, std::min(rows, kMostBlocks), stream, static_cast<Unit*>(tile.data),
         static_cast<const char*>(a.source.data), a, places, static_cast<unsigned>(packed ? units : per_pixel),
         static_cast<unsigned>(units));
}

template <class T, int V>
void blend_chunks(const BlendTiles& a, const Places& places, void* stream) {
  const auto [highest, lowest] = std::minmax_element(places.top, places.top + places.count);
  const auto [leftmost, rightmost] = std::minmax_element(places.left, places.left + places.count);
  const std::int64_t first = *leftmost / kPixels, last = (*rightmost + a.batch.tile.width - 1) / kPixels;
  const std::int64_t segments = last - first + 1, rows = *lowest - *highest + a.batch.tile.height;
  if (rows > kMostBlocks / segments)
    throw std::runtime_error("a picture is too large for one launch: use smaller tiles");
  launch(blend<T, V>, rows * segments, stream, a, places, *highest, first, static_cast<unsigned>(segments));
}

template <class In, class Out, int V>
void finish_chunks(const FinishFrames& a, void* stream) {
  launch(finish<In, Out, V>, std::min(a.acc.frames * a.acc.height, kMostBlocks), stream, a);
}

void require_narrow(const Clip& clip, std::int64_t itemsize) {  // rows are counted in 32 bits
  if (clip.width * clip.channels * itemsize >= std::int64_t{1} << 31) {
    throw std::runtime_error("rows of 2 GiB or more are not made on CUDA: use smaller tiles");
  }
}

}  // namespace

void run(const GatherTiles& args, int device, void* stream) {
  require_narrow(args.batch.tile, args.itemsize);
  const Current current(device);
  in_launches(args.batch, args.itemsize, [&](const Places& places, const TileBatch& batch) {
    GatherTiles a = args;
    a.batch = batch;
    const std::int64_t size = a.itemsize, run_bytes = a.source.channels * size;
    const bool packed = a.source.pixel == a.source.channels;
    const std::int64_t unit = common_alignment(
        {address(a.batch.tile.data), address(a.source.data), packed ? run_bytes * a.batch.tile.width : run_bytes,
         a.source.frame * size, a.source.row * size, packed ? any_left(places) * run_bytes : a.source.pixel * size});
    if (unit == 16) return gather_units<uint4>(a, places, stream);
    if (unit == 8) return gather_units<std::uint64_t>(a, places, stream);
    if (unit == 4) return gather_units<std::uint32_t>(a, places, stream);
    if (unit == 2) return gather_units<std::uint16_t>(a, places, stream);
    gather_units<std::uint8_t>(a, places, stream);
  });
}

void run(const BlendTiles& args, int device, void* stream) {
  require_narrow(args.acc, sizeof(float));
  const Current current(device);
  in_launches(args.batch, size_of(args.batch.tile.type), [&](const Places& places, const TileBatch& batch) {
    BlendTiles a = args;
    a.batch = batch;
    const std::int64_t size = size_of(batch.tile.type), C = a.acc.channels;
    const std::int64_t tile =
        common_alignment({address(batch.tile.data), batch.step * size, batch.tile.frame * size, batch.tile.row * size,
                          batch.tile.width * C * size, any_left(places) * C * size});
    const std::int64_t acc = common_alignment({address(a.acc.data), a.acc.frame * 4, a.acc.row * 4});
    with_float(batch.tile.type, [&](auto type) {
      using T = decltype(type);
      if (tile == 16 && acc == 16) return blend_chunks<T, 16 / sizeof(T)>(a, places, stream);
      blend_chunks<T, 1>(a, places, stream);
    });
  });
}

void run(const FinishFrames& a, int device, void* stream) {
  require_narrow(a.acc, sizeof(float));
  const Current current(device);
  const std::int64_t in_size = size_of(a.acc.type), out_size = size_of(a.out.type), C = a.acc.channels;
  const std::int64_t in = common_alignment({address(a.acc.data), a.acc.frame * in_size, a.acc.row * in_size});
  const std::int64_t out =
      common_alignment({address(a.out.data), a.out.frame * out_size, a.out.row * out_size, a.acc.width * C * out_size});
  const bool packed = a.acc.pixel == C && a.out.pixel == C;
  const auto call = [&](auto in_type, auto out_type) {
    using In = decltype(in_type);
    using Out = decltype(out_type);
    if (packed && in == 16 && out == 16) return finish_chunks<In, Out, 16 / sizeof(Out)>(a, stream);
    finish_chunks<In, Out, 1>(a, stream);
  };
  with_float(a.acc.type, [&](auto in_type) {
    if (a.out.type == Element::uint8) return call(in_type, std::uint8_t{});
    with_float(a.out.type, [&](auto out_type) { call(in_type, out_type); });
  });
}

}  // namespace cuda
}  // namespace pusa
