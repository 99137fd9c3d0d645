// Owning view of a tensor from another library, over DLPack: no torch headers, so one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

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

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2, kBFloat = 4;

}  // namespace dlpack

class TensorView {
 public:
  // `name` is for messages and must outlive the view. `source`: a capsule, which is used up, or an object with
  // __dlpack__. Throws std::invalid_argument (ValueError) unless it lies in this machine's memory.
  TensorView(const char* name, pybind11::handle source) : name_(name) {
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
    if (tensor().device.type != dlpack::kCpu) {
      fail("must be on the CPU", "DLPack device type " + std::to_string(tensor().device.type));
    }
  }

  const char* name() const { return name_; }
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

  void* data() const { return static_cast<char*>(tensor().data) + tensor().byte_offset; }

  bool is_float32() const { return is(dlpack::kFloat, 32); }
  bool is_bfloat16() const { return is(dlpack::kBFloat, 16); }

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
