// Which instruction set serves, how rows are shared out between threads, and sums over rows.
#include "row_ops.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// Blocks of rows that lie within one frame of one sequence each. Frames without a token have none.
class Blocks {
 public:
  Blocks(const Size& size, const Frames& frames) : size_(size), frames_(frames), first_(frames.first / frames.tokens) {
    reached_ = size.tokens > 0 ? (frames.first + size.tokens - 1) / frames.tokens - first_ + 1 : 0;
    step_ = std::max(kSummedRows, step_of(size.width));
    per_frame_ = ceil_div(std::min(frames.tokens, size.tokens), step_);
  }

  std::int64_t count() const { return size_.batch * reached_ * per_frame_; }

  Span span(std::int64_t block) const {
    const std::int64_t b = block / per_frame_ / reached_, f = first_ + block / per_frame_ % reached_;
    const std::int64_t end = std::min(frames_.tokens * (f + 1) - frames_.first, size_.tokens);
    const std::int64_t start = std::max<std::int64_t>(frames_.tokens * f - frames_.first, 0);
    const std::int64_t from = start + block % per_frame_ * step_;
    return {b * size_.tokens + std::min(from, end), b * size_.tokens + std::min(from + step_, end), block};
  }

  // The blocks [first, second) that add up to one of `groups`, which are the table's frames of each sequence, or one.
  std::pair<std::int64_t, std::int64_t> of_group(std::int64_t group, std::int64_t groups) const {
    if (groups == 1) return {0, count()};
    const std::int64_t f = group % frames_.count - first_;
    if (f < 0 || f >= reached_) return {0, 0};
    const std::int64_t start = (group / frames_.count * reached_ + f) * per_frame_;
    return {start, start + per_frame_};
  }

  bool are_groups(std::int64_t groups) const { return groups == count() && (groups == 1 || reached_ == frames_.count); }

 private:
  Size size_;
  Frames frames_;
  std::int64_t first_, reached_, step_, per_frame_;
};

// Adds up the partial sums of each group, in float64 and in the order of the blocks.
void combine(const RowSums& sums, const Blocks& blocks, std::int64_t width, int threads) {
  constexpr std::int64_t kColumns = 256;
  const std::int64_t chunks = ceil_div(width, kColumns);
  if (blocks.count() * width < kParallelSums) threads = 1;
  parallel(sums.groups * chunks, threads, 0, [&](std::int64_t task, float*) {
    const std::int64_t group = task / chunks, start = task % chunks * kColumns;
    const std::int64_t count = std::min(kColumns, width - start);
    const auto [first, last] = blocks.of_group(group, sums.groups);
    double total[kColumns] = {};
    for (std::int64_t block = first; block < last; ++block) {
      const float* row = sums.partial + block * width + start;
      for (std::int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(row[i]);
    }
    float* out = sums.data + group * width + start;
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(total[i]);
  });
}

// The blocks follow from the shapes alone, so that a sum is the same whatever others are wanted.
template <class Args>
void run_blocks(const Args& args, void (*kernel)(const Args&, Span, float*), const Blocks& blocks,
                std::initializer_list<RowSums*> wanted, int threads) {
  const Size& size = args.size;
  std::vector<Floats> memory;
  bool any = false;
  for (RowSums* sums : wanted) {
    if (!sums->data) continue;
    any = true;
    sums->partial = sums->data;
    if (blocks.are_groups(sums->groups)) continue;
    sums->partial = memory.emplace_back(allocate(blocks.count() * size.width)).get();
  }
  if (!any) return run_rows(args, kernel, threads);
  const std::int64_t useful = std::max<std::int64_t>(size.batch * size.tokens / step_of(size.width), 1);
  parallel(blocks.count(), static_cast<int>(std::min<std::int64_t>(threads, useful)), scratch_floats(size),
           [&](std::int64_t block, float* scratch) { kernel(args, blocks.span(block), scratch); });
  for (const RowSums* sums : wanted) {
    if (sums->partial != sums->data) combine(*sums, blocks, size.width, threads);
  }
}

// Of all rows as one sequence and one frame.
Blocks all_rows(const Size& size) { return {{1, size.batch * size.tokens, size.width}, kOneFrame}; }

const Kernels& kernels() { return kKernels[current_isa()]; }

}  // namespace

void run(ResidualNormForward args, int threads) { run_rows(args, kernels().residual_norm_forward, threads); }

void run(ResidualNormBackward args, int threads) {
  run_blocks(args, kernels().residual_norm_backward, {args.size, args.frames},
             {&args.dgate, &args.dscale, &args.dshift}, threads);
}

void run(GatedResidualForward args, int threads) { run_rows(args, kernels().gated_residual_forward, threads); }

void run(GatedResidualBackward args, int threads) {
  run_blocks(args, kernels().gated_residual_backward, {args.size, args.frames}, {&args.dgate}, threads);
}

void run(RmsNormForward args, int threads) { run_rows(args, kernels().rms_norm_forward, threads); }

void run(RmsNormBackward args, int threads) {
  run_blocks(args, kernels().rms_norm_backward, all_rows(args.size), {&args.dweight}, threads);
}

void run(QkRopeForward args, int threads) { run_rows(args, kernels().qk_rope_forward, threads); }

void run(QkRopeBackward args, int threads) {
  run_blocks(args, kernels().qk_rope_backward, all_rows(args.size), {&args.dweight[0], &args.dweight[1]}, threads);
}

void run(GuidedEulerStep args, int threads) {
  run_spans(args, kernels().guided_euler_step, args.planes, step_of(args.pixels), 0, threads);
}

void run(Gelu args, int threads) { run_spans(args, kernels().gelu, args.numel, kBlockElements, 0, threads); }

void run(GeluBackward args, int threads) {
  run_spans(args, kernels().gelu_backward, args.numel, kBlockElements, 0, threads);
}

void run(LinearRows args, int threads) {
  run_spans(args, kernels().linear_rows, args.features, step_of(args.in), 0, threads);
}

void run(VaeAct args, int threads) {
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
