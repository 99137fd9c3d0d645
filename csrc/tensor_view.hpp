// Owning view of a tensor from another library, over DLPack: no torch headers, so one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace pusa {

// The part of DLPack's C ABI that unversioned capsules ("dltensor") carry: dlpack.h, version 0.8.
namespace dlpack {

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: contiguous
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

constexpr std::int32_t kCpu = 1, kCuda = 2;
constexpr std::uint8_t kUnsigned = 1, kFloat = 2, kBFloat = 4;

}  // namespace dlpack

// Where an op takes its tensors.
enum class Memory { cpu, cpu_or_cuda };

class TensorView {
 public:
  // `name` is for messages and must outlive the view. `source`: a capsule, which is used up, or an object with
  // __dlpack__ (which on CUDA knows nothing of the stream that the op will use: hand over a capsule). Throws
  // std::invalid_argument (ValueError) unless it lies in memory that the op takes.
  TensorView(const char* name, pybind11::handle source, Memory memory = Memory::cpu) : name_(name) {
    pybind11::object capsule = pybind11::reinterpret_borrow<pybind11::object>(source);
    if (!PyCapsule_CheckExact(source.ptr())) {
      if (!pybind11::hasattr(source, "__dlpack__")) fail("must be a tensor or a DLPack capsule", type_of(source));
      try {
        capsule = source.attr("__dlpack__")();
      } catch (pybind11::error_already_set& error) {
        if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt
        fail("must allow export through DLPack", error.what());
      }
    }
    if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) fail("must be an unused \"dltensor\" capsule", type_of(capsule));
    managed_.reset(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor")));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    if (is_cpu() || (memory == Memory::cpu_or_cuda && is_cuda())) return;
    fail(memory == Memory::cpu ? "must be on the CPU" : "must be on the CPU or on CUDA",
         "DLPack device type " + std::to_string(tensor().device.type));
  }

  const char* name() const { return name_; }
  bool is_cpu() const { return tensor().device.type == dlpack::kCpu; }
  bool is_cuda() const { return tensor().device.type == dlpack::kCuda; }
  int device() const { return tensor().device.id; }
  int ndim() const { return tensor().ndim; }
  std::int64_t size(int axis) const { return tensor().shape[axis]; }

  std::int64_t stride(int axis) const {
    if (tensor().strides) return tensor().strides[axis];
    std::int64_t step = 1;
    for (int i = ndim() - 1; i > axis; --i) step *= size(i);
    return step;
  }

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim(); ++i) count *= size(i);
    return count;
  }

  bool empty() const {
    for (int i = 0; i < ndim(); ++i) {
      if (size(i) == 0) return true;
    }
    return false;
  }

  void* data() const { return static_cast<char*>(tensor().data) + tensor().byte_offset; }

  bool is_float32() const { return is(dlpack::kFloat, 32); }
  bool is_bfloat16() const { return is(dlpack::kBFloat, 16); }
  bool is_float16() const { return is(dlpack::kFloat, 16); }
  bool is_uint8() const { return is(dlpack::kUnsigned, 8); }
  bool same_dtype(const TensorView& other) const {
    const dlpack::DataType type = other.tensor().dtype;
    return tensor().dtype.lanes == type.lanes && is(type.code, type.bits);
  }
  std::int64_t itemsize() const {  // 0: no whole number of bytes
    const std::int64_t bits = std::int64_t{tensor().dtype.bits} * tensor().dtype.lanes;
    return bits % 8 == 0 ? bits / 8 : 0;
  }

  bool is_contiguous() const {
    std::int64_t step = 1;
    for (int i = ndim() - 1; i >= 0; --i) {
      if (size(i) != 1 && stride(i) != step) return numel() == 0;
      step *= size(i);
    }
    return true;
  }

  // Each throws std::invalid_argument.
  void require_rank(int rank) const {
    if (ndim() != rank) fail("must have rank " + std::to_string(rank), "shape " + shape());
  }
  void require_shape(std::initializer_list<std::int64_t> wanted) const {
    bool same = ndim() == static_cast<int>(wanted.size());
    int axis = 0;
    for (std::int64_t length : wanted) same = same && size(axis++) == length;
    if (!same) fail("must have shape " + text(wanted.begin(), static_cast<int>(wanted.size())), shape());
  }
  void require_unit_last_stride() const {
    if (ndim() > 0 && size(ndim() - 1) > 1 && stride(ndim() - 1) != 1) {
      fail("must have a last stride of 1", std::to_string(stride(ndim() - 1)));
    }
  }
  void require_contiguous() const {
    if (!is_contiguous()) fail("must be contiguous", "shape " + shape() + " with strides " + strides());
  }

  void require_device(const TensorView& other) const {
    if (tensor().device.type != other.tensor().device.type || device() != other.device()) {
      fail(std::string("must be on the device of ") + other.name() + ", " + other.place(), place());
    }
  }
  // Elements at multiples of their own size, and no overflow in what follows from sizes and strides.
  void require_addressable() const {
    for (int i = 0; i < ndim(); ++i) {
      if (size(i) < 0) fail("must have sizes of 0 or more", shape());
    }
    if (empty()) return;
    if (reinterpret_cast<std::uintptr_t>(data()) % static_cast<std::uintptr_t>(std::max<std::int64_t>(itemsize(), 1)) !=
        0) {
      fail("must be aligned to its elements of " + std::to_string(itemsize()) + " bytes", "another address");
    }
    bytes();
  }
  // Each element at a place of its own: strides that nest. For what an op writes.
  void require_no_self_overlap() const {
    if (empty()) return;
    std::array<std::pair<std::int64_t, std::int64_t>, 8> axes;  // stride, size
    int count = 0;
    for (int i = 0; i < ndim(); ++i) {
      if (size(i) == 1) continue;
      if (count == static_cast<int>(axes.size())) fail("must have at most 8 axes", shape());
      axes[static_cast<std::size_t>(count++)] = {stride(i), size(i)};
    }
    std::sort(axes.begin(), axes.begin() + count);
    std::int64_t reached = 0;  // the largest offset along the axes so far
    for (int i = 0; i < count; ++i) {
      const auto [step, length] = axes[static_cast<std::size_t>(i)];
      if (step <= reached) fail("must not overlap itself", "shape " + shape() + " with strides " + strides());
      reached += step * (length - 1);
    }
  }
  // Not a byte between its first and last element in common with `other`.
  void require_apart(const TensorView& other) const {
    if (empty() || other.empty()) return;
    const auto [first, last] = bytes();
    const auto [other_first, other_last] = other.bytes();
    if (first <= other_last && other_first <= last) {
      fail(std::string("must not share memory with ") + other.name(), "overlapping addresses");
    }
  }

  [[noreturn]] void fail(const std::string& wanted, const std::string& got) const {
    throw std::invalid_argument(std::string(name_) + " " + wanted + ", got " + got);
  }

  std::string shape() const { return text(tensor().shape, ndim()); }
  std::string dtype() const {
    const dlpack::DataType type = tensor().dtype;
    return "DLPack type (code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits)";
  }

 private:
  struct Release {
    void operator()(dlpack::ManagedTensor* managed) const {
      if (managed->deleter) managed->deleter(managed);
    }
  };

  const dlpack::Tensor& tensor() const { return managed_->tensor; }
  bool is(std::uint8_t code, std::uint8_t bits) const {
    const dlpack::DataType type = tensor().dtype;
    return type.code == code && type.bits == bits && type.lanes == 1;
  }
  // First and last byte of what the view can reach. Only for a view with elements.
  std::pair<std::uintptr_t, std::uintptr_t> bytes() const {
    std::int64_t low = 0, high = itemsize() - 1;
    for (int i = 0; i < ndim(); ++i) {
      std::int64_t& end = stride(i) < 0 ? low : high;
      std::int64_t reach = 0;
      if (__builtin_mul_overflow(size(i) - 1, stride(i), &reach) || __builtin_mul_overflow(reach, itemsize(), &reach) ||
          __builtin_add_overflow(end, reach, &end)) {
        fail("must fit into memory", "shape " + shape() + " with strides " + strides());
      }
    }
    const auto address = reinterpret_cast<std::uintptr_t>(data());
    return {address + static_cast<std::uintptr_t>(low), address + static_cast<std::uintptr_t>(high)};
  }
  std::string place() const { return is_cpu() ? "the CPU" : "CUDA device " + std::to_string(device()); }
  std::string strides() const {
    std::string out;
    for (int i = 0; i < ndim(); ++i) out += (i ? ", " : "") + std::to_string(stride(i));
    return "[" + out + "]";
  }
  static std::string text(const std::int64_t* values, int count) {
    std::string out;
    for (int i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
    return "[" + out + "]";
  }
  static std::string type_of(pybind11::handle object) {
    return pybind11::str(pybind11::type::handle_of(object).attr("__name__")).cast<std::string>();
  }

  const char* name_;
  std::unique_ptr<dlpack::ManagedTensor, Release> managed_;
};

}  // namespace pusa
