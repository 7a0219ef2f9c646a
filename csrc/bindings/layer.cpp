#include "moe/layer.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "base/error.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "moe/layer_job.h"
#include "targets/dispatch.h"

namespace py = pybind11;

namespace kt {
namespace {

// Memory that Python and the extension hold together: an array of that dtype and shape, whose base
// says so.
constexpr char kLent[] = "kt_kernel memory";

py::array take_array(Engine& engine, const py::dtype& dtype, const std::vector<int64_t>& shape,
                     size_t bytes) {
  auto holder = std::make_unique<std::shared_ptr<uint8_t>>(engine.outputs->take(bytes));
  uint8_t* const data = holder->get();
  const py::capsule owner(holder.get(), kLent, [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<uint8_t>*>(PyCapsule_GetPointer(capsule, kLent));
  });
  static_cast<void>(holder.release());
  return {dtype, shape, data, owner};
}

// The memory of such an array of so many bytes; throws std::invalid_argument for any other.
std::shared_ptr<uint8_t> lent(const py::array& array, size_t bytes) {
  const py::object base = array.base();
  if (!base || !PyCapsule_IsValid(base.ptr(), kLent))
    fail_argument("out is not an array of take_buffer or take_like");
  if (static_cast<size_t>(array.nbytes()) != bytes)
    fail_argument("out has ", array.nbytes(), " bytes, expected ", bytes);
  return *static_cast<std::shared_ptr<uint8_t>*>(PyCapsule_GetPointer(base.ptr(), kLent));
}

std::shared_ptr<Layer> make_layer(std::shared_ptr<Engine> engine, int64_t num_experts,
                                  int64_t top_k, int64_t hidden_size, int64_t intermediate_size,
                                  const std::string& method, std::shared_ptr<ExpertMask> on_gpu) {
  const LayerConfig config{num_experts, top_k, hidden_size, intermediate_size,
                           parse_method(method)};
  return std::make_shared<Layer>(config, std::move(engine), std::move(on_gpu));
}

void load_file(Layer& layer, const std::string& path, const std::array<FileOffsets, 3>& offsets,
               const std::optional<py::array>& tables, const std::vector<int64_t>& source) {
  if (has_tables(layer.config().method) && !tables)
    fail_argument("weights of method ", kMethods[static_cast<int>(layer.config().method)].name,
                  " need tables");
  const int8_t* const table_data =
      tables ? checked_data<int8_t>(*tables, {kNumTables, kTableLevels}, "tables") : nullptr;
  const WithoutGil released;
  layer.load_file(path, offsets, table_data, source);
}

void load_matrices(Layer& layer, const std::array<py::array, 3>& weights, const std::string& dtype,
                   const std::vector<int64_t>& source) {
  const SourceDtype source_dtype = parse_source_dtype(dtype);
  if (source_dtype == SourceDtype::kFp8E4m3)
    fail_argument("dtype is fp8_e4m3, whose scales are missing: expected bf16, fp16 or fp32");
  std::array<SourceMatrix, 3> stacked;
  for (Projection projection : kProjections) {
    const ProjectionLayout layout = layer.layout(projection);
    const auto i = static_cast<size_t>(projection);
    const char* const name = std::array{"gate", "up", "down"}[i];
    const void* const data = checked_weights(
        weights[i], {layer.config().num_experts, layout.n, layout.k}, source_dtype, name);
    stacked[i] = {data, source_dtype, nullptr, layout.n, layout.k};
  }
  const WithoutGil released;
  layer.load_matrices(stacked, source);
}

std::pair<std::shared_ptr<Job>, std::shared_ptr<Deferred>> submit(
    Layer& layer, const py::array& x, const py::array& ids, const py::array& weights,
    const py::array& out, int64_t num_deferred, std::shared_ptr<Deferred> before) {
  if (x.ndim() != 2) fail_argument("x has ", x.ndim(), " dimensions, expected 2");
  const int64_t tokens = x.shape(0);
  const std::vector<int64_t> routing = {tokens, layer.config().top_k};
  const std::vector<int64_t> rows = {tokens, layer.config().hidden_size};
  CallInputs inputs;
  inputs.tokens = tokens;
  if (py::isinstance<py::array_t<uint16_t>>(x)) {
    inputs.dtype = ActivationDtype::kBf16;
    inputs.x = checked_data<uint16_t>(x, rows, "x");
  } else {
    inputs.x = checked_data<float>(x, rows, "x");
  }
  inputs.ids.is_int64 = py::isinstance<py::array_t<int64_t>>(ids);
  inputs.ids.data = inputs.ids.is_int64
                        ? static_cast<const void*>(checked_data<int64_t>(ids, routing, "ids"))
                        : checked_data<int32_t>(ids, routing, "ids");
  inputs.weights = checked_data<float>(weights, routing, "weights");
  CallOutput output{lent(out, layer.output_bytes(inputs.dtype, tokens)), inputs.dtype,
                    std::move(before)};
  checked_deferred(num_deferred);
  const WithoutGil released;
  const auto [job, deferred] = layer.submit(inputs, std::move(output), num_deferred);
  return {job, deferred};
}

// The slices' memory, which each array keeps alive with its layer; nobody writes there.
py::list slices_of(const std::shared_ptr<Layer>& layer) {
  py::list found;
  for (const Slice& slice : layer->slices()) {
    const std::vector<int64_t> shape = {layer->config().num_experts, slice.slot_bytes()};
    if (slice.weights().data() == nullptr) fail_runtime("the layer has no weights");
    py::array_t<uint8_t> weights(shape, slice.weights().data(), py::cast(layer));
    py::list offsets;
    for (Projection projection : kProjections) offsets.append(slice.part_offsets(projection));
    found.append(py::make_tuple(slice.begin(), slice.end(), offsets, weights));
  }
  return found;
}

}  // namespace

void bind_layer(py::module_& module) {
  py::class_<Job, std::shared_ptr<Job>>(module, "Job")
      .def("wait", [](Job& job) { WorkerPool::wait(job); }, py::call_guard<WithoutGil>());

  static_cast<void>(py::class_<Deferred, std::shared_ptr<Deferred>>(module, "Deferred"));

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init([](std::vector<std::vector<int>> cpus, int slices, const std::string& target) {
             return std::make_shared<Engine>(std::move(cpus), slices, find_target(target));
           }),
           py::arg("cpus"), py::arg("slices"), py::arg("target"))
      .def(
          "take_buffer",
          [](Engine& engine, size_t bytes) {
            return take_array(engine, py::dtype::of<uint8_t>(), {static_cast<int64_t>(bytes)},
                              bytes);
          },
          py::arg("bytes"))
      .def(
          "take_like",
          [](Engine& engine, const py::array& array) {
            return take_array(engine, array.dtype(), shape_of(array),
                              static_cast<size_t>(array.nbytes()));
          },
          py::arg("array"))
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

  py::class_<ExpertMask, std::shared_ptr<ExpertMask>>(module, "ExpertMask")
      .def(py::init([](int64_t num_experts) {
             if (num_experts < 1 || num_experts > kMaxExperts)
               fail_argument("num_experts is ", num_experts, ": expected 1 to ", kMaxExperts);
             return std::make_shared<ExpertMask>(static_cast<size_t>(num_experts));
           }),
           py::arg("num_experts"))
      .def_property_readonly("array", [](const std::shared_ptr<ExpertMask>& mask) {
        return py::array_t<bool>(static_cast<py::ssize_t>(mask->on_gpu.size()),
                                 reinterpret_cast<bool*>(mask->on_gpu.data()), py::cast(mask));
      });

  py::class_<Layer, std::shared_ptr<Layer>>(module, "Layer")
      .def(py::init(&make_layer), py::arg("engine").none(false), py::arg("num_experts"),
           py::arg("top_k"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("method"), py::arg("on_gpu") = nullptr)
      .def("load_file", &load_file, py::arg("path"), py::arg("offsets"), py::arg("tables"),
           py::arg("source"))
      .def("load_matrices", &load_matrices, py::arg("weights"), py::arg("dtype"), py::arg("source"))
      .def("submit", &submit, py::arg("x"), py::arg("ids"), py::arg("weights"), py::arg("out"),
           py::arg("deferred") = 0, py::arg("before") = nullptr)
      .def_property_readonly("weight_bytes", &Layer::weight_bytes)
      .def_property_readonly("token_counts",
                             [](const Layer& layer) {
                               const std::vector<int64_t> counts = layer.token_counts();
                               return py::array_t<int64_t>(static_cast<py::ssize_t>(counts.size()),
                                                           counts.data());
                             })
      .def_property_readonly("slices", &slices_of);
}

}  // namespace kt
