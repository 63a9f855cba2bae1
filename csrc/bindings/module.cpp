// The compiled module: a table of contents. Each bind_*.cpp binds one family of ops from csrc/ops/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "cpu/dispatch/target.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of foveate. Take them through torch.ops.foveate or the public functions.";
  m.def(
      "cpu_targets",
      [] {
        std::vector<std::pair<std::string, bool>> names;
        for (const auto& t : foveate::cpu::targets()) names.emplace_back(t.name, t.runs_here);
        return names;
      },
      "(name, runs on this machine) of every compiled CPU instruction set, weakest first");
  m.def("cpu_target", [] { return std::string(foveate::cpu::active_target().name); }, "the CPU instruction set in use");
  m.def("uses_dlpack_exchange", &foveate::uses_dlpack_exchange);
  m.def("set_dlpack_exchange", &foveate::set_dlpack_exchange, py::arg("enabled"));
  foveate::bind_attention(m);
  foveate::bind_loss(m);
  foveate::bind_cuda(m);
  foveate::bind_decoder(m);
  foveate::bind_kv_cache(m);
  foveate::bind_linear(m);
  foveate::bind_glu(m);
  foveate::bind_norm(m);
  foveate::bind_roofline(m);
  foveate::bind_rotary(m);
  foveate::bind_softmax(m);
}
