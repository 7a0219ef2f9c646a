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

void check_shape(const py::array& array, const std::vector<int64_t>& expected, const char* name) {
  const std::vector<int64_t> found(array.shape(), array.shape() + array.ndim());
  if (found == expected) return;
  const auto text = [](const std::vector<int64_t>& shape) {
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
  };
  fail_argument(name, " has shape ", text(found), ", expected ", text(expected));
}

void check_dims(int64_t n, int64_t k) {
  if (n < kDimMultiple || n % kDimMultiple != 0 || k < kDimMultiple || k % kDimMultiple != 0)
    fail_argument("a projection of ", n, " x ", k,
                  " cannot be packed: expected positive multiples of ", kDimMultiple);
}

std::vector<int64_t> codes_shape(int64_t n, int64_t k, const std::string& method) {
  check_dims(n, k);
  const ProjectionLayout layout{n, k, parse_method(method)};
  return {layout.panels(), layout.codes_per_panel() / 64, 64};
}

py::dict quantize(const py::array& weight, const std::string& dtype,
                  const std::optional<Array<float>>& scale_inv, const std::string& method,
                  const std::string& target) {
  if (weight.ndim() != 2 || !(weight.flags() & py::array::c_style))
    fail_argument("weight has ", weight.ndim(),
                  " dimensions or gaps: expected a contiguous matrix");
  SourceMatrix source;
  source.dtype = parse_source_dtype(dtype);
  const int64_t element = source_bytes(source.dtype);
  if (weight.itemsize() != element)
    fail_argument("weight has ", weight.itemsize(), "-byte elements, ", dtype, " has ", element);
  source.data = weight.data();
  source.n = weight.shape(0);
  source.k = weight.shape(1);
  check_dims(source.n, source.k);
  if ((source.dtype == SourceDtype::kFp8E4m3) != scale_inv.has_value())
    fail_argument("scale_inv belongs to fp8_e4m3 and to no other dtype; dtype is ", dtype);
  if (scale_inv) {
    check_shape(*scale_inv, {(source.n + 127) / 128, (source.k + 127) / 128}, "scale_inv");
    source.block_scales = scale_inv->data();
  }
  const Method how = parse_method(method);
  const ProjectionLayout layout{source.n, source.k, how};
  Array<uint8_t> codes({layout.panels(), layout.codes_per_panel() / 64, int64_t{64}});
  Array<uint8_t> index({layout.panels(), layout.index_per_panel() / 4, int64_t{4}});
  Array<uint16_t> scales(layout.n);
  const PackedProjection out{codes.mutable_data(), index.mutable_data(), scales.mutable_data()};
  const QuantizeKernels& kernels = find_target(target).quantize;
  {
    const py::gil_scoped_release release;
    quantize_projection(source, how, kernels, out);
  }
  py::dict packed;
  packed["codes"] = codes;
  if (is_int4(how)) packed["table_index"] = index;
  packed["scales"] = scales;
  return packed;
}

Array<float> dequantize(const Array<uint8_t>& codes, const Array<uint16_t>& scales,
                        const std::optional<Array<uint8_t>>& index,
                        const std::optional<Array<int8_t>>& tables, int64_t n, int64_t k,
                        const std::string& method) {
  check_shape(codes, codes_shape(n, k, method), "codes");
  check_shape(scales, {n}, "scales");
  const ProjectionLayout layout{n, k, parse_method(method)};
  if (is_int4(layout.method)) {
    if (!index || !tables) fail_argument("int4 needs table_index and tables");
    check_shape(*index, {layout.panels(), layout.index_per_panel() / 4, 4}, "table_index");
    check_shape(*tables, {kNumTables, kTableLevels}, "tables");
  }
  Array<float> weights({n, k});
  float* out = weights.mutable_data();
  const uint8_t* index_data = index ? index->data() : nullptr;
  const int8_t* tables_data = tables ? tables->data() : nullptr;
  const uint8_t* codes_data = codes.data();
  const uint16_t* scales_data = scales.data();
  {
    const py::gil_scoped_release release;
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
        return Array<int8_t>({kNumTables, kTableLevels}, &int4_tables(parse_method(method))[0][0]);
      },
      py::arg("method"));
}

}  // namespace kt
