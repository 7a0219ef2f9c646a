#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "stream/staging.h"
#include "stream/stream_layer.h"

namespace py = pybind11;

namespace kt {
namespace {

std::chrono::milliseconds checked_limit(double seconds) {
  constexpr double kYear = 365.0 * 24 * 60 * 60;
  if (!(seconds >= 0 && seconds <= kYear))
    fail_argument("a limit of ", seconds, " s: expected 0 to ", kYear);
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

uint8_t* without_gaps(const py::array_t<uint8_t>& memory) {
  if (!(memory.flags() & py::array::c_style)) fail_argument("memory has gaps");
  return const_cast<uint8_t*>(memory.data());
}

// The context goes when the last memory that it has pinned is gone.
void pin_outputs(const std::shared_ptr<StreamContext>& context, const Engine& engine) {
  engine.outputs->use(std::make_shared<const Pinning>(Pinning{
      [context](uint8_t* memory, size_t bytes) { context->runtime.register_memory(memory, bytes); },
      [context](uint8_t* memory) { context->runtime.forget_memory(memory); }}));
}

}  // namespace

void bind_stream(py::module_& module) {
  py::class_<StreamContext, std::shared_ptr<StreamContext>>(module, "StreamContext")
      .def(py::init([](const std::string& library) {
             return std::make_shared<StreamContext>(find_cuda_runtime(library));
           }),
           py::arg("library"))
      .def_property_readonly("failure", &StreamContext::failure)
      .def(
          "register_memory",
          [](StreamContext& context, const py::array_t<uint8_t>& memory) {
            context.runtime.register_memory(without_gaps(memory),
                                            static_cast<size_t>(memory.nbytes()));
          },
          py::arg("memory").noconvert())
      .def(
          "unregister_memory",
          [](StreamContext& context, const py::array_t<uint8_t>& memory) {
            context.runtime.unregister_memory(without_gaps(memory));
          },
          py::arg("memory").noconvert())
      .def("pin_outputs", &pin_outputs, py::arg("engine"))
      .def(
          "end_overdue",
          [](StreamContext& context, double seconds) {
            context.end_overdue(checked_limit(seconds));
          },
          py::arg("seconds"), py::call_guard<WithoutGil>())
      .def(
          "use_flags",
          // A nap of 10 ms takes a thousandth of a CPU.
          [](StreamContext& context, const std::string& driver, double seconds, double nap) {
            context.use_flags(driver, checked_limit(seconds), checked_limit(nap));
          },
          py::arg("driver"), py::arg("seconds") = 5.0, py::arg("nap") = 0.01,
          py::call_guard<WithoutGil>())
      .def_property("flags", &StreamContext::flags, &StreamContext::set_flags);

  py::class_<StreamLayer>(module, "StreamLayer")
      .def(py::init<std::shared_ptr<StreamContext>, std::shared_ptr<Layer>, int>(),
           py::arg("context").none(false), py::arg("layer").none(false), py::arg("layer_idx"))
      .def(
          "submit",
          [](StreamLayer& layer, uintptr_t stream, uintptr_t x, const std::string& dtype,
             int64_t tokens, uintptr_t ids, bool int64_ids, uintptr_t weights, int64_t deferred,
             StreamLayer* before) {
            const CallInputs inputs{checked_address(x, "x"), parse_activation_dtype(dtype), tokens,
                                    ExpertIds{checked_address(ids, "ids"), int64_ids},
                                    static_cast<const float*>(checked_address(weights, "weights"))};
            checked_deferred(deferred);
            const WithoutGil released;
            layer.submit(reinterpret_cast<CudaStream>(stream), inputs, deferred, before);
          },
          py::arg("stream"), py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("ids"),
          py::arg("int64_ids"), py::arg("weights"), py::arg("deferred") = 0,
          py::arg("before") = nullptr)
      .def(
          "sync",
          [](StreamLayer& layer, uintptr_t stream, uintptr_t out) {
            auto* const to = const_cast<void*>(checked_address(out, "out"));
            const WithoutGil released;
            layer.sync(reinterpret_cast<CudaStream>(stream), to);
          },
          py::arg("stream"), py::arg("out"));

  py::class_<Staging>(module, "Staging")
      .def(py::init([](const std::shared_ptr<StreamContext>& context, const std::vector<int>& cpus,
                       int threads, int buffers, size_t buffer_bytes) {
             return std::make_unique<Staging>(context ? context->runtime : direct_runtime(),
                                              Staging::Sizes{threads, buffers, buffer_bytes}, cpus);
           }),
           py::arg("context"), py::arg("cpus"), py::arg("threads"), py::arg("buffers"),
           py::arg("buffer_bytes"))
      .def(
          "copy",
          [](Staging& staging, const py::array_t<uint8_t>& memory, uintptr_t to, uintptr_t stream) {
            const uint8_t* const from = without_gaps(memory);
            auto* const target =
                static_cast<uint8_t*>(const_cast<void*>(checked_address(to, "to")));
            const auto bytes = static_cast<size_t>(memory.nbytes());
            const WithoutGil released;
            staging.copy(from, target, bytes, reinterpret_cast<CudaStream>(stream));
          },
          py::arg("memory").noconvert(), py::arg("to"), py::arg("stream"));
}

}  // namespace kt
