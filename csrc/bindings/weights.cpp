#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "base/error.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "targets/dispatch.h"
#include "weights/quantize.h"

namespace py = pybind11;

namespace kt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void check_dims(int64_t n, int64_t k) {
  for (int64_t dim : {n, k})
    if (dim < kDimMultiple || dim > kMaxDim || dim % kDimMultiple != 0)
      fail_argument("a projection of ", n, " x ", k,
                    " cannot be packed: expected positive multiples of ", kDimMultiple, " up to ",
                    kMaxDim);
}

std::vector<int64_t> codes_shape(int64_t n, int64_t k, const std::string& method) {
  check_dims(n, k);
  const ProjectionLayout layout{n, k, parse_method(method)};
  return {layout.panels(), layout.codes_per_panel() / 64, 64};
}

py::dict quantize(const py::array& weight, const std::string& dtype,
                  const std::optional<py::array>& scale_inv, const std::string& method,
                  const std::string& target) {
  if (weight.ndim() != 2) fail_argument("weight has ", weight.ndim(), " dimensions, expected 2");
  SourceMatrix source;
  source.dtype = parse_source_dtype(dtype);
  source.n = weight.shape(0);
  source.k = weight.shape(1);
  check_dims(source.n, source.k);
  source.data = checked_weights(weight, {source.n, source.k}, source.dtype, "weight");
  if ((source.dtype == SourceDtype::kFp8E4m3) != scale_inv.has_value())
    fail_argument("scale_inv belongs to fp8_e4m3 and to no other dtype; dtype is ", dtype);
  if (scale_inv)
    source.block_scales = checked_data<float>(
        *scale_inv, {(source.n + 127) / 128, (source.k + 127) / 128}, "scale_inv");
  const Method how = parse_method(method);
  const ProjectionLayout layout{source.n, source.k, how};
  Array<uint8_t> codes({layout.panels(), layout.codes_per_panel() / 64, int64_t{64}});
  Array<uint8_t> index({layout.panels(), layout.index_per_panel() / 4, int64_t{4}});
  Array<uint16_t> scales(layout.n);
  const PackedProjection out{codes.mutable_data(), index.mutable_data(), scales.mutable_data()};
  const QuantizeKernels& kernels = find_target(target).quantize;
  {
    const WithoutGil released;
    quantize_projection(source, how, kernels, out);
  }
  py::dict packed;
  packed["codes"] = codes;
  if (has_tables(how)) packed["table_index"] = index;
  packed["scales"] = scales;
  return packed;
}

Array<float> dequantize(const py::array& codes, const py::array& scales,
                        const std::optional<py::array>& index,
                        const std::optional<py::array>& tables, int64_t n, int64_t k,
                        const std::string& method) {
  check_dims(n, k);
  const ProjectionLayout layout{n, k, parse_method(method)};
  const auto* codes_data = checked_data<uint8_t>(codes, codes_shape(n, k, method), "codes");
  const auto* scales_data = checked_data<uint16_t>(scales, {n}, "scales");
  const uint8_t* index_data = nullptr;
  const int8_t* tables_data = nullptr;
  if (has_tables(layout.method)) {
    if (!index || !tables) fail_argument("method ", method, " needs table_index and tables");
    index_data = checked_data<uint8_t>(*index, {layout.panels(), layout.index_per_panel() / 4, 4},
                                       "table_index");
    tables_data = checked_data<int8_t>(*tables, {kNumTables, kTableLevels}, "tables");
  }
  Array<float> weights({n, k});
  float* out = weights.mutable_data();
  {
    const WithoutGil released;
    dequantize_projection(layout, codes_data, index_data, scales_data, tables_data, out);
  }
  return weights;
}

}  // namespace

void bind_weights(py::module_& module) {
  module.def("codes_shape", &codes_shape, py::arg("n"), py::arg("k"), py::arg("method"));
  module.def("quantize_projection", &quantize, py::arg("weight"), py::arg("dtype"),
             py::arg("scale_inv"), py::arg("method"), py::arg("target") = "");
  module.def("dequantize_projection", &dequantize, py::arg("codes"), py::arg("scales"),
             py::arg("table_index"), py::arg("tables"), py::arg("n"), py::arg("k"),
             py::arg("method"));
  module.def(
      "int4_tables",
      [](const std::string& method) {
        const Method how = parse_method(method);
        if (!has_tables(how)) fail_argument("method ", method, " has no tables");
        return Array<int8_t>({kNumTables, kTableLevels}, &int4_tables(how)[0][0]);
      },
      py::arg("method"));
}

}  // namespace kt
