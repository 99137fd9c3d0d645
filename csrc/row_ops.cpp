// Which instruction set serves, how rows are shared out between threads, and sums over rows.
#include "row_ops.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_features.hpp"
#include "parallel.hpp"

namespace pusa {
namespace {

struct Kernels {
#define PUSA_FIELD(name, Args) void (*name)(const Args&, Span, float*);
  PUSA_ROW_KERNELS(PUSA_FIELD)
#undef PUSA_FIELD
};

#define PUSA_BASE(name, Args) &base::name,
#define PUSA_AVX2(name, Args) &avx2::name,
#define PUSA_AVX512(name, Args) &avx512::name,
constexpr Kernels kKernels[kIsas] = {
    {PUSA_ROW_KERNELS(PUSA_BASE)},
#if defined(PUSA_X86_KERNELS)
    {PUSA_ROW_KERNELS(PUSA_AVX2)},
    {PUSA_ROW_KERNELS(PUSA_AVX512)},
#endif
};
constexpr const char* kNames[kIsas] = {"base", "avx2", "avx512"};
constexpr const char* kVariable = "PUSA_NATIVE_ISA";

bool has(const char* feature) {
  for (const CpuFeature& candidate : cpu_features()) {
    if (std::strcmp(candidate.name, feature) == 0) return candidate.usable;
  }
  return false;
}

bool usable(int index) {
  if (kKernels[index].gelu == nullptr) return false;  // not built for this kind of processor
  if (index == 0) return true;
  const bool avx2 = has("avx2") && has("fma");
  return index == 1 ? avx2 : avx2 && has("avx512f") && has("avx512bw");
}

int find_isa(const char* name, const std::string& said_by) {
  std::string choices;
  for (int i = 0; i < kIsas; ++i) {
    if (!usable(i)) continue;
    if (std::strcmp(kNames[i], name) == 0) return i;
    choices += (choices.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument(said_by + " is " + name + ": this build and processor have " + choices);
}

std::atomic<int> chosen_isa{-1};

}  // namespace

int current_isa() {
  int index = chosen_isa.load(std::memory_order_relaxed);
  if (index >= 0) return index;
  const char* wanted = std::getenv(kVariable);
  if (wanted && *wanted) {
    index = find_isa(wanted, kVariable);
  } else {
    for (index = kIsas - 1; !usable(index);) --index;
  }
  chosen_isa.store(index, std::memory_order_relaxed);
  return index;
}

namespace {

// Below this many elements of work for each, a second thread costs more than it gives; for adding up partial sums,
// below kParallelSums. A block of rows whose sums go to one partial holds kSummedRows or more.
constexpr std::int64_t kBlockElements = 16'384;
constexpr std::int64_t kSummedRows = 64;
constexpr std::int64_t kParallelSums = 1 << 20;

// kernel(args, span, scratch) on at most one span a thread, each a multiple of `step` items (but for the last).
template <class Args>
void run_spans(const Args& args, void (*kernel)(const Args&, Span, float*), std::int64_t items, std::int64_t step,
               std::int64_t scratch_floats, int threads) {
  const std::int64_t steps = ceil_div(items, step), spans = std::min<std::int64_t>(threads, steps);
  parallel(spans, threads, scratch_floats, [&](std::int64_t i, float* scratch) {
    const std::int64_t first = steps * i / spans * step, last = steps * (i + 1) / spans * step;
    kernel(args, {first, std::min(items, last), 0}, scratch);
  });
}

std::int64_t scratch_floats(const Size& size) { return kScratchRows * (size.width + 64); }

// Items of `width` elements each that keep a thread busy for long enough.
std::int64_t step_of(std::int64_t width) { return ceil_div(kBlockElements, std::max<std::int64_t>(width, 1)); }

template <class Args>
void run_rows(const Args& args, void (*kernel)(const Args&, Span, float*), int threads) {
  const Size& size = args.size;
  run_spans(args, kernel, size.batch * size.tokens, step_of(size.width), scratch_floats(size), threads);
}

// Blocks of rows that lie within one of the `segments` equal shares of all rows.
struct Blocks {
  Blocks(const Size& size, std::int64_t segments)
      : rows(segments ? size.batch * size.tokens / segments : 0),
        step(std::max(kSummedRows, step_of(size.width))),
        per_segment(ceil_div(rows, step)),
        count(per_segment * segments) {}

  Span span(std::int64_t block) const {
    const std::int64_t start = block / per_segment * rows, offset = block % per_segment * step;
    return {start + offset, start + std::min(rows, offset + step), block};
  }

  std::int64_t rows, step, per_segment, count;
};

// Memory for the partial sums of one RowSums: none of its own where each group is one block.
class Partial {
 public:
  Partial(RowSums sums, std::int64_t blocks, std::int64_t width) : sums_(sums), blocks_(blocks), width_(width) {
    if (sums.data && sums.groups != blocks) own_ = allocate(blocks * width);
  }

  float* data() const { return own_ ? own_.get() : sums_.data; }

  // In float64 and in the order of the blocks.
  void combine(int threads) const {
    if (!own_) return;
    constexpr std::int64_t kColumns = 256;
    const std::int64_t chunks = ceil_div(width_, kColumns), share = blocks_ / sums_.groups;
    if (blocks_ * width_ < kParallelSums) threads = 1;
    parallel(sums_.groups * chunks, threads, 0, [&](std::int64_t task, float*) {
      const std::int64_t group = task / chunks, start = task % chunks * kColumns;
      const std::int64_t count = std::min(kColumns, width_ - start);
      double total[kColumns] = {};
      for (std::int64_t block = group * share; block < (group + 1) * share; ++block) {
        const float* row = own_.get() + block * width_ + start;
        for (std::int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(row[i]);
      }
      float* out = sums_.data + group * width_ + start;
      for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(total[i]);
    });
  }

 private:
  RowSums sums_;
  std::int64_t blocks_, width_;
  Floats own_;
};

template <class Args>
void run_blocks(const Args& args, void (*kernel)(const Args&, Span, float*), const Blocks& blocks, int threads) {
  const Size& size = args.size;
  const std::int64_t useful = std::max<std::int64_t>(size.batch * size.tokens / step_of(size.width), 1);
  parallel(blocks.count, static_cast<int>(std::min<std::int64_t>(threads, useful)), scratch_floats(size),
           [&](std::int64_t block, float* scratch) { kernel(args, blocks.span(block), scratch); });
}

const Kernels& kernels() { return kKernels[current_isa()]; }

}  // namespace

void run(const ResidualNormForward& args, int threads) { run_rows(args, kernels().residual_norm_forward, threads); }

void run(ResidualNormBackward args, RowSums gate, RowSums scale, RowSums shift, std::int64_t segments, int threads) {
  const auto kernel = kernels().residual_norm_backward;
  if (!gate.data && !scale.data) return run_rows(args, kernel, threads);
  const Blocks blocks(args.size, segments);
  const std::int64_t width = args.size.width;
  const Partial gates(gate, blocks.count, width), scales(scale, blocks.count, width),
      shifts(shift, blocks.count, width);
  args.gate_partial = gates.data();
  args.scale_partial = scales.data();
  args.shift_partial = shifts.data();
  run_blocks(args, kernel, blocks, threads);
  for (const Partial* sums : {&gates, &scales, &shifts}) sums->combine(threads);
}

void run(const GatedResidualForward& args, int threads) { run_rows(args, kernels().gated_residual_forward, threads); }

void run(GatedResidualBackward args, RowSums gate, int threads) {
  const auto kernel = kernels().gated_residual_backward;
  if (!gate.data) return run_rows(args, kernel, threads);
  const Blocks blocks(args.size, gate.groups);
  const Partial gates(gate, blocks.count, args.size.width);
  args.gate_partial = gates.data();
  run_blocks(args, kernel, blocks, threads);
  gates.combine(threads);
}

void run(const RmsNormForward& args, int threads) { run_rows(args, kernels().rms_norm_forward, threads); }

void run(RmsNormBackward args, RowSums weight, int threads) {
  const auto kernel = kernels().rms_norm_backward;
  if (!weight.data) return run_rows(args, kernel, threads);
  const Blocks blocks(args.size, weight.groups);
  const Partial weights(weight, blocks.count, args.size.width);
  args.weight_partial = weights.data();
  run_blocks(args, kernel, blocks, threads);
  weights.combine(threads);
}

void run(const QkRopeForward& args, int threads) { run_rows(args, kernels().qk_rope_forward, threads); }

void run(QkRopeBackward args, RowSums weight_q, RowSums weight_k, int threads) {
  const auto kernel = kernels().qk_rope_backward;
  if (!weight_q.data) return run_rows(args, kernel, threads);
  const Blocks blocks(args.size, weight_q.groups);
  const Partial q(weight_q, blocks.count, args.size.width), k(weight_k, blocks.count, args.size.width);
  args.weight_partial[0] = q.data();
  args.weight_partial[1] = k.data();
  run_blocks(args, kernel, blocks, threads);
  q.combine(threads);
  k.combine(threads);
}

void run(const GuidedEulerStep& args, int threads) {
  run_spans(args, kernels().guided_euler_step, args.planes, step_of(args.pixels), 0, threads);
}

void run(const Gelu& args, std::int64_t numel, int threads) {
  run_spans(args, kernels().gelu, numel, kBlockElements, 0, threads);
}

void run(const GeluBackward& args, std::int64_t numel, int threads) {
  run_spans(args, kernels().gelu_backward, numel, kBlockElements, 0, threads);
}

void run(const LinearRows& args, int threads) {
  run_spans(args, kernels().linear_rows, args.features, step_of(args.in), 0, threads);
}

void run(const VaeAct& args, int threads) {
  const std::int64_t pixels = args.size[0] * args.size[1] * args.size[2] * args.size[3];
  run_spans(args, kernels().vae_act, pixels, step_of(args.channels), kPixelRows * (args.channels + 64), threads);
}

const char* isa() { return kNames[current_isa()]; }

void set_isa(const char* name) { chosen_isa.store(find_isa(name, "the instruction set"), std::memory_order_relaxed); }

bool isa_usable(int index, const char** name) {
  *name = kNames[index];
  return usable(index);
}

}  // namespace pusa
