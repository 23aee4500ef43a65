// What the bindings share: arguments checked, memory handed over as read-only arrays that own it. Arrays given to a function
// must not be written to while it runs.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ragged.h"
#include "buffer.h"
#include "loader.h"
#include "packed.h"
#include "pair_plan.h"

namespace fastpref {

namespace py = pybind11;

inline constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();

inline std::string describe(py::handle object) {
  return py::repr(object).cast<std::string>() + " (" + Py_TYPE(object.ptr())->tp_name + ")";
}

// An integer of Python's or NumPy's in [low, high].
template <class T>
T integer(py::handle object, const char* name, T low, T high) {
  const auto fail = [&]() -> std::string {
    return std::string(name) + " must be an integer in [" + std::to_string(low) + ", " + std::to_string(high) +
           "], but received " + describe(object);
  };
  const auto index = py::reinterpret_steal<py::object>(PyBool_Check(object.ptr()) ? nullptr
                                                                                  : PyNumber_Index(object.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(fail());
  }
  T value{};
  if constexpr (std::is_signed_v<T>) {
    value = static_cast<T>(PyLong_AsLongLong(index.ptr()));
  } else {
    value = static_cast<T>(PyLong_AsUnsignedLongLong(index.ptr()));
  }
  const bool overflow = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  if (overflow || value < low || value > high) throw py::value_error(fail());
  return value;
}

// A contiguous array of exactly T and that many dimensions, borrowed: `object` must outlive the span.
template <class T>
std::span<const T> contiguous(py::handle object, const char* name, py::ssize_t dimensions,
                              std::vector<py::ssize_t>* shape = nullptr) {
  const auto rule = [&] {
    return std::string(name) + " must be a contiguous array of " +
           (dimensions == 1 ? "one dimension" : std::to_string(dimensions) + " dimensions") + " and type " +
           py::str(py::dtype::of<T>()).template cast<std::string>() + ", but received ";
  };
  if (!py::isinstance<py::array>(object)) throw py::type_error(rule() + Py_TYPE(object.ptr())->tp_name);
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().equal(py::dtype::of<T>())) {
    throw py::type_error(rule() + py::str(array.dtype()).cast<std::string>());
  }
  if (array.ndim() != dimensions || !(array.flags() & py::array::c_style)) {
    throw py::value_error(rule() + std::to_string(array.ndim()) + " dimensions" +
                          (array.flags() & py::array::c_style ? "" : ", not contiguous"));
  }
  if (shape != nullptr) shape->assign(array.shape(), array.shape() + array.ndim());
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <class T>
std::span<const T> vector(py::handle object, const char* name) {
  return contiguous<T>(object, name, 1);
}

// What setflags(write=False) does, without the call: a batch has fourteen arrays.
inline void read_only(py::array& array) {
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
}

template <class T>
inline py::array to_numpy(Buffer<T>&& buffer, const std::vector<py::ssize_t>& shape) {
  T* data = buffer.data();
  const py::capsule owner(data, [](void* pointer) { Free{}(pointer); });
  buffer.release();
  py::array array(py::dtype::of<T>(), shape, data, owner);
  read_only(array);
  return array;
}

inline void check_count(const char* name, std::size_t count, std::size_t records) {
  if (count != records) {
    throw py::value_error(std::string(name) + " must have one entry for each of the " + std::to_string(records) +
                          " records, but received " + std::to_string(count));
  }
}

// Keeps the array of values alive for as long as rows of it can be asked for.
struct Column {
  py::object values;
  Ragged ragged;
};

// Each adds its part to the module.
void define_columns(py::module_& module);
void define_batches(py::module_& module);

inline Layout layout_from(py::handle layout, py::handle start_token) {
  const std::string rule = "layout must be 'shared', 'separate' or 'encoder-decoder', but received ";
  if (!py::isinstance<py::str>(layout)) throw py::type_error(rule + describe(layout));
  const auto name = layout.cast<std::string>();
  const auto start = static_cast<std::int32_t>(integer<std::int64_t>(start_token, "decoder_start", 0, kMaxInt32));
  if (name == "shared") return {Style::kShared, start};
  if (name == "separate") return {Style::kSeparate, start};
  if (name == "encoder-decoder") return {Style::kEncoderDecoder, start};
  throw py::value_error(rule + describe(layout));
}

inline std::int32_t max_pairs_from(py::handle object, std::int64_t rows) {
  const auto most = static_cast<std::int32_t>(integer<std::int64_t>(object, "max_pairs_per_row", 1, kMaxInt32));
  if (rows > (kMaxInt32 / 2) / most) {
    throw py::value_error("rows * max_pairs_per_row must be below 2^30, but received " + std::to_string(rows) + " * " +
                          std::to_string(most));
  }
  return most;
}

inline PackConfig pack_config_from(py::handle shapes, py::handle batch_pairs, py::handle max_pairs, py::handle window,
                                   py::handle seed, bool encoder) {
  PackConfig config{};
  config.batch_pairs = static_cast<std::int32_t>(integer<std::int64_t>(batch_pairs, "batch_pairs", 0, kMaxWindow));
  const bool counted = config.batch_pairs > 0;
  const std::size_t most_shapes = counted ? kMaxRowCounts : kMaxRowShapes;
  const std::string rule = "shapes must be 1 to " + std::to_string(most_shapes) +
                           " triples (rows, decoder places, encoder places), " +
                           (counted ? "rows growing to at least batch_pairs and places alike"
                                    : "no row smaller than the one before in either stream and no two equal") +
                           ", encoder places 0 exactly without an encoder, but received ";
  if (!py::isinstance<py::sequence>(shapes) || py::isinstance<py::str>(shapes)) {
    throw py::type_error(rule + describe(shapes));
  }
  bool chain = true;
  std::int64_t most_rows = 0;
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(shapes)) {
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 3) throw py::type_error(rule + describe(shapes));
    const auto triple = py::reinterpret_borrow<py::tuple>(item);
    const RowShape shape{
        static_cast<std::int32_t>(integer<std::int64_t>(triple[0], "rows", 1, kMaxInt32 / 2)),
        {static_cast<std::int32_t>(integer<std::int64_t>(triple[1], "row_tokens", 1, kMaxRowTokens)),
         static_cast<std::int32_t>(integer<std::int64_t>(triple[2], "prompt_row_tokens", 0, kMaxRowTokens))}};
    chain = chain && (shape.capacity.prompt > 0) == encoder;
    if (!config.shapes.empty()) {
      const RowShape& before = config.shapes.back();
      const bool alike = before.capacity == shape.capacity;
      chain = chain && (counted ? alike && before.rows < shape.rows : !alike && fits(before.capacity, shape.capacity));
    }
    most_rows = std::max<std::int64_t>(most_rows, shape.rows);
    config.shapes.push_back(shape);
  }
  if (!chain || config.shapes.empty() || config.shapes.size() > most_shapes || most_rows < config.batch_pairs) {
    throw py::value_error(rule + describe(shapes));
  }
  config.max_pairs = max_pairs_from(max_pairs, most_rows);
  config.window = static_cast<std::int32_t>(integer<std::int64_t>(window, "window", 1, kMaxWindow));
  config.seed = integer<std::uint64_t>(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  return config;
}

// The arrays of a batch, in the order of Field; together they own its memory.
inline py::tuple packed_to_numpy(PackedBatch&& batch) {
  const PackedShape& shape = batch.shape;
  const PackedOffsets offsets = offsets_of(shape);
  std::byte* const memory = batch.memory->data();
  const py::capsule owner(batch.memory.get(), [](void* lease) { delete static_cast<Lease*>(lease); });
  batch.memory.release();
  const auto rows = static_cast<py::ssize_t>(shape.rows);
  const auto slots = static_cast<py::ssize_t>(shape.slots());
  const auto int32 = py::dtype::of<std::int32_t>();
  const auto float32 = py::dtype::of<float>();
  py::tuple fields(static_cast<std::size_t>(kFields));
  for (std::size_t field = 0; field < kFields; ++field) {
    std::vector<py::ssize_t> sides{slots};
    py::dtype type = int32;
    if (field <= kSequences) {
      sides = {rows, shape.tokens};
    } else if (field <= kPromptPairs) {
      sides = {rows, shape.prompt};
    } else if (field == kLengths) {
      sides = {slots, 2};
    } else if (field == kRefLogps || field == kScores) {
      sides = {slots, 2};
      type = float32;
    } else if (field == kPreference) {
      type = float32;
    } else if (field == kWhere) {
      type = py::dtype::of<bool>();
    } else if (field == kIds) {
      type = py::dtype::of<std::int64_t>();
    }
    py::array array(type, sides, memory + offsets.at[field], owner);
    read_only(array);
    fields[field] = std::move(array);
  }
  return fields;
}

}  // namespace fastpref
