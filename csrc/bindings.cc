// The module, and columns of token ids.
#include "bindings.h"

#include <optional>

namespace fastpref {
namespace {

Column make_column(const py::object& values, const py::object& offsets, const py::object& vocab_size) {
  const auto ids = vector<std::int32_t>(values, "values");
  const auto bounds = vector<std::int64_t>(offsets, "offsets");
  const auto limit =
      vocab_size.is_none() ? kMaxInt32 + 1 : integer<std::int64_t>(vocab_size, "vocab_size", 1, kMaxInt32 + 1);
  std::optional<Ragged> ragged;
  {
    const py::gil_scoped_release release;
    ragged.emplace(ids, std::vector<std::int64_t>(bounds.begin(), bounds.end()), limit);
  }
  return {values, std::move(*ragged)};
}

py::array column_lengths(const Column& column) {
  const std::int64_t rows = column.ragged.rows();
  Buffer<std::int32_t> lengths(static_cast<std::size_t>(rows));
  for (std::int64_t i = 0; i < rows; ++i) lengths[i] = static_cast<std::int32_t>(column.ragged.row(i).size());
  return to_numpy(std::move(lengths), {rows});
}

}  // namespace

void define_columns(py::module_& module) {
  py::class_<Column>(module, "Column")
      .def(py::init(&make_column), py::arg("values"), py::arg("offsets"), py::kw_only(),
           py::arg("vocab_size") = py::none())
      .def("__len__", [](const Column& column) { return column.ragged.rows(); })
      .def("lengths", &column_lengths);
}

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() = "Native core of fastpref.data, which alone may import it; its typed face is _native.pyi.";
  define_columns(module);
  define_batches(module);
}

}  // namespace fastpref
