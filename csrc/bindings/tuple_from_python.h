// A NamedTuple of Python -> a struct that lists its members in `fields()` (core/fields.h). Each is read by its place in the tuple, without
// a look at names: a call has 24 of them.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/tensor_from_python.h"
#include "contract/attention.h"
#include "contract/kv_cache.h"
#include "core/fields.h"

namespace foveate {

template <class Struct>
constexpr size_t kNumFields = std::tuple_size_v<decltype(Struct::fields())>;

template <class Struct>
pybind11::tuple field_names() {
  return std::apply([](const auto&... field) { return pybind11::make_tuple(field.name...); }, Struct::fields());
}

[[noreturn]] inline void refuse_field(const char* name, const char* expected, pybind11::handle item) {
  PyErr_Clear();
  throw pybind11::type_error(std::string(name) + " must be " + expected + ", got " + Py_TYPE(item.ptr())->tp_name);
}

inline void read_field(const char*, pybind11::handle item, TensorView& to, Reachable& reachable) {
  if (item.is_none()) return;
  to = tensor_from_python(item);
  reachable.set(to);
}
inline void read_field(const char* name, pybind11::handle item, bool& to, Reachable&) {
  if (item.ptr() != Py_True && item.ptr() != Py_False) refuse_field(name, "a bool", item);
  to = item.ptr() == Py_True;
}
inline void read_field(const char* name, pybind11::handle item, int64_t& to, Reachable&) {
  to = PyLong_AsLongLong(item.ptr());
  if (to == -1 && PyErr_Occurred()) refuse_field(name, "an integer of 64 bits", item);
}
inline void read_field(const char* name, pybind11::handle item, double& to, Reachable&) {
  to = PyFloat_AsDouble(item.ptr());
  if (to == -1 && PyErr_Occurred()) refuse_field(name, "a number", item);
}

template <class Struct, class Owner, class T>
void read_field(const Field<Owner, T>& field, pybind11::handle item, Struct& to, Reachable& reachable) {
  read_field(field.name, item, to.*field.member, reachable);
}
template <class Struct>
void read_field(const UnreadField&, pybind11::handle, Struct&, Reachable&) {}

}  // namespace foveate

namespace pybind11::detail {

template <class Struct>
struct named_tuple_caster {
  PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr())) foveate::refuse_field("the operands", "a tuple", source);
    constexpr size_t count = foveate::kNumFields<Struct>;
    if (static_cast<size_t>(PyTuple_GET_SIZE(source.ptr())) != count)
      throw type_error("the operands are " + std::to_string(PyTuple_GET_SIZE(source.ptr())) + ", expected " + std::to_string(count));
    read(source, std::make_index_sequence<count>());
    return true;
  }

 private:
  template <size_t... I>
  void read(handle source, std::index_sequence<I...>) {
    constexpr auto fields = Struct::fields();
    (foveate::read_field(std::get<I>(fields), PyTuple_GET_ITEM(source.ptr(), I), value, reachable[I]), ...);
  }
  std::array<foveate::Reachable, foveate::kNumFields<Struct>> reachable;  // as long as the call lasts
};

template <>
struct type_caster<foveate::AttentionOperands> : named_tuple_caster<foveate::AttentionOperands> {};
template <>
struct type_caster<foveate::AttentionGradOperands> : named_tuple_caster<foveate::AttentionGradOperands> {};
template <>
struct type_caster<foveate::CacheOperands> : named_tuple_caster<foveate::CacheOperands> {};
template <>
struct type_caster<foveate::CacheWorkspace> : named_tuple_caster<foveate::CacheWorkspace> {};
template <>
struct type_caster<foveate::DecodePlan> : named_tuple_caster<foveate::DecodePlan> {};

}  // namespace pybind11::detail
