// As much of CUDA as csrc/vae_tiling.cu uses, on the CPU: a block's threads are threads, which meet at __syncthreads,
// and blocks run one after another. So sanitizers can watch kernels for what lies outside memory, and for races within
// a block.
#pragma once

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
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
  std::barrier<> barrier(config->blockDim.x);
  block_barrier = &barrier;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < config->blockDim.x; ++i) {
    threads.emplace_back([&, i] {
      threadIdx = dim3(i);
      gridDim = config->gridDim;
      for (unsigned block = 0; block < config->gridDim.x; ++block) {
        blockIdx = dim3(block);
        kernel(args...);
        barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
