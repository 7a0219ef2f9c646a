#include "moe/layer.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "base/error.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "targets/dispatch.h"

namespace py = pybind11;

namespace kt {
namespace {

std::shared_ptr<Layer> make_layer(std::shared_ptr<Engine> engine, int64_t num_experts,
                                  int64_t top_k, int64_t hidden_size, int64_t intermediate_size,
                                  const std::string& method) {
  const LayerConfig config{num_experts, top_k, hidden_size, intermediate_size,
                           parse_method(method)};
  return std::make_shared<Layer>(config, std::move(engine));
}

void load_file(Layer& layer, const std::string& path, const std::array<FileOffsets, 3>& offsets,
               const std::optional<py::array_t<int8_t, py::array::c_style>>& tables,
               const std::vector<int64_t>& source) {
  if (is_int4(layer.config().method) && (!tables || tables->size() != kNumTables * kTableLevels))
    fail_argument("int4 weights need tables of ", kNumTables, " x ", kTableLevels);
  const int8_t* table_data = tables ? tables->data() : nullptr;
  const py::gil_scoped_release release;
  layer.load_file(path, offsets, table_data, source);
}

void load_matrices(Layer& layer, const std::array<uintptr_t, 3>& addresses,
                   const std::string& dtype, const std::vector<int64_t>& source) {
  std::array<SourceMatrix, 3> stacked;
  for (Projection projection : kProjections) {
    const ProjectionLayout layout = layer.layout(projection);
    const auto i = static_cast<size_t>(projection);
    stacked[i] = {pointer<const void>(addresses[i]), parse_source_dtype(dtype), nullptr, layout.n,
                  layout.k};
  }
  const py::gil_scoped_release release;
  layer.load_matrices(stacked, source);
}

// An array that gives its memory back to the engine when nothing refers to it any more.
py::array take_buffer(const std::shared_ptr<Engine>& engine, size_t bytes) {
  struct Loan {
    std::shared_ptr<Engine> engine;
    Buffer buffer;
    ~Loan() { engine->give_buffer(std::move(buffer)); }
  };
  std::unique_ptr<Loan> loan(new Loan{engine, engine->take_buffer(bytes)});
  uint8_t* const data = loan->buffer.data();
  const py::capsule owner(loan.release(), [](void* p) { delete static_cast<Loan*>(p); });
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes), data, owner);
}

std::shared_ptr<Job> submit(Layer& layer, uintptr_t x, const std::string& dtype, int64_t tokens,
                            uintptr_t ids, uintptr_t weights, uintptr_t on_gpu, uintptr_t out) {
  const ActivationDtype activation = parse_activation_dtype(dtype);
  const py::gil_scoped_release release;
  return layer.submit(pointer<const void>(x), activation, tokens, pointer<const int32_t>(ids),
                      pointer<const float>(weights), pointer<const uint8_t>(on_gpu),
                      pointer<void>(out));
}

}  // namespace

void bind_layer(py::module_& module) {
  py::class_<Job, std::shared_ptr<Job>>(module, "Job")
      .def(
          "wait", [](Job& job) { WorkerPool::wait(job); },
          py::call_guard<py::gil_scoped_release>());

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init([](std::vector<std::vector<int>> cpus, int slices, const std::string& target) {
             return std::make_shared<Engine>(std::move(cpus), slices, find_target(target));
           }),
           py::arg("cpus"), py::arg("slices"), py::arg("target"))
      .def("take_buffer", &take_buffer, py::arg("bytes"))
      .def_property_readonly("target", [](const Engine& e) { return std::string(e.kernels.name); })
      .def_property_readonly("cpus", [](const Engine& e) { return e.pool.cpus(); })
      .def_property_readonly("totals", [](const Engine& e) {
        const CallTotals t = e.totals();
        py::dict found;
        found["calls"] = t.calls;
        found["tokens"] = t.tokens;
        found["experts"] = t.experts;
        found["prepare_ns"] = t.prepare_ns;
        found["workers_ns"] = t.workers_ns;
        return found;
      });

  py::class_<Layer, std::shared_ptr<Layer>>(module, "Layer")
      .def(py::init(&make_layer), py::arg("engine"), py::arg("num_experts"), py::arg("top_k"),
           py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("method"))
      .def("load_file", &load_file, py::arg("path"), py::arg("offsets"), py::arg("tables"),
           py::arg("source"))
      .def("load_matrices", &load_matrices, py::arg("addresses"), py::arg("dtype"),
           py::arg("source"))
      .def("submit", &submit, py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("ids"),
           py::arg("weights"), py::arg("on_gpu"), py::arg("out"))
      .def_property_readonly("weight_bytes", &Layer::weight_bytes);
}

}  // namespace kt
