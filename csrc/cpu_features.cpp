#include "cpu_features.hpp"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define PUSA_X86_64 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace pusa {
namespace {

#ifdef PUSA_X86_64

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<std::uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = static_cast<std::uint32_t>(out[0]);
  r.ebx = static_cast<std::uint32_t>(out[1]);
  r.ecx = static_cast<std::uint32_t>(out[2]);
  r.edx = static_cast<std::uint32_t>(out[3]);
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros if the leaf does not exist
#endif
  return r;
}

// XCR0: the register state that the operating system saves. Valid only if cpuid reports OSXSAVE.
std::uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

bool bit(std::uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

#endif

}  // namespace

std::array<CpuFeature, 6> cpu_features() {
  bool avx2 = false, fma = false, avx512f = false, avx512bw = false, avx512_bf16 = false, amx = false;
#ifdef PUSA_X86_64
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  const std::uint64_t state = bit(basic.ecx, 27) ? saved_state() : 0;
  const auto saved = [state](std::uint64_t mask) { return (state & mask) == mask; };
  const bool ymm = saved(0x6);        // xmm, ymm
  const bool zmm = saved(0xe6);       // and opmask, both halves of zmm
  const bool tiles = saved(0x60000);  // tile configuration and data
  avx2 = ymm && bit(extended.ebx, 5);
  fma = ymm && bit(basic.ecx, 12);
  avx512f = zmm && bit(extended.ebx, 16);
  avx512bw = avx512f && bit(extended.ebx, 30);
  avx512_bf16 = avx512f && bit(extended1.eax, 5);
  amx = tiles && bit(extended.edx, 24) && bit(extended.edx, 22);  // amx-tile, amx-bf16
#endif
  return {{{"avx2", avx2},
           {"fma", fma},
           {"avx512f", avx512f},
           {"avx512bw", avx512bw},
           {"avx512_bf16", avx512_bf16},
           {"amx", amx}}};
}

}  // namespace pusa
