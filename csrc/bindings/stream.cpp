#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "stream/stream_layer.h"

namespace py = pybind11;

namespace kt {

void bind_stream(py::module_& module) {
  py::class_<StreamContext, std::shared_ptr<StreamContext>>(module, "StreamContext")
      .def(py::init([](const std::string& library) {
             return std::make_shared<StreamContext>(find_cuda_runtime(library));
           }),
           py::arg("library"))
      .def_property_readonly("failure", &StreamContext::failure)
      .def(
          "end_overdue",
          [](StreamContext& context, double seconds) {
            context.end_overdue(std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000)));
          },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>());

  py::class_<StreamLayer>(module, "StreamLayer")
      .def(py::init<std::shared_ptr<StreamContext>, std::shared_ptr<Layer>, int, bool>(),
           py::arg("context"), py::arg("layer"), py::arg("layer_idx"), py::arg("deferred") = false)
      .def(
          "submit",
          [](StreamLayer& layer, uintptr_t stream, uintptr_t x, const std::string& dtype,
             int64_t tokens, uintptr_t ids, uintptr_t weights, uintptr_t on_gpu) {
            const ActivationDtype activation = parse_activation_dtype(dtype);
            const py::gil_scoped_release release;
            layer.submit(pointer<void>(stream), pointer<const void>(x), activation, tokens,
                         pointer<const int32_t>(ids), pointer<const float>(weights),
                         pointer<const uint8_t>(on_gpu));
          },
          py::arg("stream"), py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("ids"),
          py::arg("weights"), py::arg("on_gpu"))
      .def(
          "sync",
          [](StreamLayer& layer, uintptr_t stream, uintptr_t out) {
            const py::gil_scoped_release release;
            layer.sync(pointer<void>(stream), pointer<void>(out));
          },
          py::arg("stream"), py::arg("out"));
}

}  // namespace kt
