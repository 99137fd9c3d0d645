// As much of CUDA as csrc/vae_tiling.cu uses, on the CPU: its threads share nothing, so they run one after another.
// Sanitizers can then watch the kernel for accesses outside its memory.
#pragma once

#include <cstddef>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};

inline dim3 threadIdx, blockIdx, gridDim;
inline float __fdiv_rn(float a, float b) { return a / b; }

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given... args) {
  gridDim = config->gridDim;
  for (blockIdx = dim3(0); blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    for (threadIdx = dim3(0); threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(args...);
  }
  return cudaSuccess;
}
