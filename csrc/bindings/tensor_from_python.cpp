#include "bindings/tensor_from_python.h"

#include <string>

#include "core/check.h"
#include "ops/device.h"

namespace py = pybind11;

namespace foveate {
namespace {

// What is known of torch once it has been imported. Looked up on the first tensor, kept for the life of the process.
struct Torch {
  py::handle tensor_type;
  const dlpack::ExchangeApi* exchange = nullptr;
  bool use_exchange = false;
  py::handle data_ptr, shape, stride, dtype, device, type, index, itemsize;
};

// torch's current stream on a device.
void* stream_through_exchange(int device);
void* stream_through_attributes(int device) {
  const py::gil_scoped_acquire gil;
  const py::object torch_c = py::module_::import("torch").attr("_C");
  return reinterpret_cast<void*>(torch_c.attr("_cuda_getCurrentRawStream")(device).cast<uintptr_t>());
}

Torch load_torch() {
  Torch t;
  t.tensor_type = py::object(py::module_::import("torch").attr("Tensor")).release();
  if (py::hasattr(t.tensor_type, "__dlpack_c_exchange_api__")) {
    py::object capsule = t.tensor_type.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version_major == 1) t.exchange = api;
  }
  t.use_exchange = t.exchange != nullptr;
  set_stream_source(t.exchange && t.exchange->current_work_stream ? stream_through_exchange : stream_through_attributes);
  const auto intern = [](const char* s) { return py::handle(PyUnicode_InternFromString(s)); };
  t.data_ptr = intern("data_ptr"), t.shape = intern("shape"), t.stride = intern("stride"), t.dtype = intern("dtype");
  t.device = intern("device"), t.type = intern("type"), t.index = intern("index");
  return t;
}

Torch& torch_api() {
  static Torch* t = new Torch(load_torch());  // never destroyed: Python may be gone before static destructors run
  return *t;
}

void* stream_through_exchange(int device) {
  void* stream = nullptr;
  check(torch_api().exchange->current_work_stream(dlpack::kCUDA, device, &stream) == 0,
        "torch does not tell the current stream of cuda:", device);
  return stream;
}

DType dtype_from_dlpack(const dlpack::Tensor& t) {
  const int code = t.type_code, bits = t.type_bits;
  if (t.type_lanes == 1) {
    if (code == dlpack::kFloat && bits == 32) return DType::kFloat32;
    if (code == dlpack::kBfloat && bits == 16) return DType::kBFloat16;
    if (code == dlpack::kFloat && bits == 16) return DType::kFloat16;
    if (code == dlpack::kFloat && bits == 64) return DType::kFloat64;
    if (code == dlpack::kInt && bits == 32) return DType::kInt32;
    if (code == dlpack::kInt && bits == 64) return DType::kInt64;
    if (code == dlpack::kBool && bits == 8) return DType::kBool;
    if (code == dlpack::kInt && bits == 8) return DType::kInt8;
    if (code == dlpack::kFloat8E4M3FN && bits == 8) return DType::kFloat8E4M3;
  }
  throw py::type_error(
      "foveate kernels take float32, float64, float16, bfloat16, int8, float8_e4m3fn, int32, int64 and bool tensors; this one has DLPack "
      "type code " +
      std::to_string(code) + " with " + std::to_string(bits) + " bits");
}

DType dtype_from_name(const std::string& text) {
  for (DType t : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kFloat8E4M3, DType::kInt32,
                  DType::kInt64, DType::kBool})
    if (text == std::string("torch.") + name(t)) return t;
  throw py::type_error("foveate kernels take no " + text + " tensors");
}

// A product of sizes beyond 64 bits, as an expanded tensor may have, would pass for a small or an empty tensor.
void check_countable(const TensorView& view) {
  int64_t elements = 1;
  bool empty = false, countable = true;
  for (int i = 0; i < view.ndim; ++i) {
    empty = empty || view.shape[i] == 0;
    countable = countable && !__builtin_mul_overflow(elements, view.shape[i], &elements);
  }
  check(empty || countable, "a tensor has more elements than 64 bits count");
}

void set_rank(TensorView& view, int64_t ndim) {
  check(ndim <= kMaxDims, "a tensor has ", ndim, " dimensions, foveate kernels take at most ", kMaxDims);
  view.ndim = static_cast<int>(ndim);
}

TensorView through_exchange(py::handle object, const Torch& torch) {
  dlpack::Tensor t;
  if (torch.exchange->tensor_from_py(object.ptr(), &t) != 0) throw py::error_already_set();
  TensorView view;
  view.data = static_cast<char*>(t.data) + (t.data ? t.byte_offset : 0);
  view.dtype = dtype_from_dlpack(t);
  switch (t.device_type) {
    case dlpack::kCPU:
    case dlpack::kCUDAHost: view.device = DeviceType::kCPU; break;
    case dlpack::kCUDA:
    case dlpack::kCUDAManaged: view.device = DeviceType::kCUDA; break;
    default: fail("foveate kernels take CPU and CUDA tensors; this one is on DLPack device type ", t.device_type);
  }
  view.device_index = t.device_id;
  set_rank(view, t.ndim);
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides ? t.strides[i] : expected;
    expected *= t.shape[i];
  }
  return view;
}

TensorView through_attributes(py::handle object, const Torch& torch) {
  TensorView view;
  view.data = reinterpret_cast<void*>(object.attr(torch.data_ptr)().cast<uintptr_t>());
  view.dtype = dtype_from_name(py::str(object.attr(torch.dtype)));
  py::object device = object.attr(torch.device);
  const std::string type = py::str(device.attr(torch.type));
  check(type == "cpu" || type == "cuda", "foveate kernels take CPU and CUDA tensors; this one is on ", type);
  view.device = type == "cuda" ? DeviceType::kCUDA : DeviceType::kCPU;
  if (py::object index = device.attr(torch.index); !index.is_none()) view.device_index = index.cast<int>();
  const py::tuple shape = object.attr(torch.shape), stride = object.attr(torch.stride)();
  set_rank(view, static_cast<int64_t>(shape.size()));
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = shape[i].cast<int64_t>();
    view.stride[i] = stride[i].cast<int64_t>();
  }
  return view;
}

}  // namespace

TensorView tensor_from_python(py::handle object) {
  if (object.is_none()) return {};
  const Torch& torch = torch_api();
  // The exchange function trusts its caller: it may only be given instances of torch.Tensor.
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(torch.tensor_type.ptr()) && !py::isinstance(object, torch.tensor_type))
    throw py::type_error("expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  TensorView view = torch.use_exchange ? through_exchange(object, torch) : through_attributes(object, torch);
  check_countable(view);
  if (!view.data && view.numel() > 0)
    throw py::type_error(
        std::string("a tensor of type ") + Py_TYPE(object.ptr())->tp_name +
        " has no memory (a fake, meta or lazy tensor): call the torch.ops.foveate op, which has a fake kernel, not the compiled module");
  return view;
}

bool uses_dlpack_exchange() { return torch_api().use_exchange; }

void set_dlpack_exchange(bool enabled) {
  check(!enabled || torch_api().exchange, "this torch has no DLPack C exchange API (it came with torch 2.10)");
  torch_api().use_exchange = enabled;
}

}  // namespace foveate
