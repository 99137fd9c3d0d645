// Boxes from tiles on CUDA: one launch a box on the caller's stream. A thread makes elements of its own and adds tiles
// in their order, so results are the same every time and nothing is shared or atomic.
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
constexpr std::int64_t kMostBlocks = 1 << 30;

using bf16 = __nv_bfloat16;
using f16 = __half;

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

// A block makes row after row of a frame.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads) blend(const __grid_constant__ BlendBox a) {
  const unsigned C = static_cast<unsigned>(a.channels), elements = static_cast<unsigned>(a.width) * C;
  for (std::int64_t row = blockIdx.x; row < a.frames * a.height; row += gridDim.x) {
    const std::int64_t t = row / a.height, i = row - t * a.height, y = a.top + i;
    Out* const out = static_cast<Out*>(a.out) + t * a.frame + i * a.row;
    for (unsigned e = threadIdx.x; e < elements; e += kThreads) {
      const std::int64_t x = a.left + e / C;
      float sum = -0.0f, weight = 0.0f;
      for (int n = 0; n < a.count; ++n) {
        const Tile& tile = a.tiles[n];
        if (y < tile.top || y >= tile.top + tile.height || x < tile.left || x >= tile.left + tile.width) continue;
        const float mask = smaller(row_weight(a, tile, y), column_weight(a, tile, x));
        const std::int64_t from = t * tile.frame + (y - tile.top) * tile.row + (x - tile.left) * C + e % C;
        sum += mask * wide(static_cast<const In*>(tile.data)[from]);
        weight += mask;
      }
      out[e] = narrow<Out>(finished(__fdiv_rn(sum, weight), a, out));
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

}  // namespace

void run(const BlendBox& a, int device, void* stream) {
  if (a.width >= (std::int64_t{1} << 31) / a.channels)
    throw std::runtime_error("rows of 2^31 or more elements are not made on CUDA: use smaller tiles");
  const Current current(device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(a.frames * a.height, kMostBlocks)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const auto launch = [&](auto in, auto out) {
    check(cudaLaunchKernelEx(&config, blend<decltype(in), decltype(out)>, a));
  };
  with_float(a.type, [&](auto in) {
    if (a.out_type == Element::uint8) return launch(in, std::uint8_t{});
    with_float(a.out_type, [&](auto out) { launch(in, out); });
  });
}

}  // namespace cuda
}  // namespace pusa
