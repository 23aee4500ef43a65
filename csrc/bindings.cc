// The only file that knows of Python. It checks every argument, releases the GIL around the work, and hands memory over
// as read-only arrays that own it. Arrays given to a function must not be written to while it runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "assemble.h"
#include "buffer.h"
#include "pair_log.h"
#include "plan.h"
#include "state.h"
#include "tournament.h"

namespace py = pybind11;

namespace fastpref {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();

std::string describe(py::handle object) {
  return py::repr(object).cast<std::string>() + " (" + Py_TYPE(object.ptr())->tp_name + ")";
}

// An integer of Python's or NumPy's in [low, high].
template <class T>
T integer(py::handle object, const char* name, T low, T high) {
  const auto fail = [&]() -> std::string {
    return std::string(name) + " must be an integer in [" + std::to_string(low) + ", " + std::to_string(high) +
           "], got " + describe(object);
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

// A one-dimensional contiguous array of exactly T, borrowed: `object` must outlive the span.
template <class T>
std::span<const T> vector(py::handle object, const char* name) {
  const auto rule = [&] {
    return std::string(name) + " must be a contiguous array of one dimension and type " +
           py::str(py::dtype::of<T>()).template cast<std::string>() + ", got ";
  };
  if (!py::isinstance<py::array>(object)) throw py::type_error(rule() + Py_TYPE(object.ptr())->tp_name);
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().equal(py::dtype::of<T>())) {
    throw py::type_error(rule() + py::str(array.dtype()).cast<std::string>());
  }
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw py::value_error(rule() + std::to_string(array.ndim()) + " dimensions" +
                          (array.flags() & py::array::c_style ? "" : ", not contiguous"));
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <class T>
py::array to_numpy(Buffer<T>&& buffer, const std::vector<py::ssize_t>& shape) {
  T* data = buffer.data();
  const py::capsule owner(data, [](void* pointer) { Free{}(pointer); });
  buffer.release();
  py::array array(py::dtype::of<T>(), shape, data, owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

std::vector<Shape> shapes_from(py::handle object) {
  const std::string rule = "shapes must be 1 to " + std::to_string(kMaxShapes) +
                           " pairs (prompt, completion) of lengths, none smaller than the one before on either side "
                           "and no two equal, got ";
  if (!py::isinstance<py::sequence>(object) || py::isinstance<py::str>(object)) {
    throw py::type_error(rule + describe(object));
  }
  std::vector<Shape> shapes;
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(object)) {
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 2) throw py::type_error(rule + describe(object));
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    shapes.push_back({static_cast<std::int32_t>(integer<std::int64_t>(pair[0], "shapes", 1, kMaxInt32)),
                      static_cast<std::int32_t>(integer<std::int64_t>(pair[1], "shapes", 0, kMaxInt32))});
  }
  bool chain = !shapes.empty() && shapes.size() <= kMaxShapes;
  for (std::size_t i = 1; chain && i < shapes.size(); ++i) {
    chain = shapes[i - 1].prompt <= shapes[i].prompt && shapes[i - 1].completion <= shapes[i].completion &&
            shapes[i - 1] != shapes[i];
  }
  if (!chain) throw py::value_error(rule + describe(object));
  return shapes;
}

std::vector<py::tuple> shapes_to(const std::vector<Shape>& shapes) {
  std::vector<py::tuple> pairs;
  for (const Shape& shape : shapes) pairs.push_back(py::make_tuple(shape.prompt, shape.completion));
  return pairs;
}

void check_values(std::span<const std::int32_t> values, const char* name, std::int32_t low, std::int32_t high) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < low || values[i] > high) {
      throw py::value_error(std::string(name) + " must be in [" + std::to_string(low) + ", " + std::to_string(high) +
                            "], got " + std::to_string(values[i]) + " at " + std::to_string(i));
    }
  }
}

void check_count(const char* name, std::size_t count, std::size_t records) {
  if (count != records) {
    throw py::value_error(std::string(name) + " must have one entry for each of the " + std::to_string(records) +
                          " records, got " + std::to_string(count));
  }
}

// Keeps the array of values alive for as long as rows of it can be asked for.
struct Column {
  py::object values;
  Ragged ragged;
};

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

std::vector<py::tuple> py_choose_shapes(const py::object& prompt_lengths, const py::object& completion_lengths,
                                        const py::object& completions, const py::object& max_shapes,
                                        const py::object& multiple, const py::object& max_prompt,
                                        const py::object& max_completion) {
  const auto prompts = vector<std::int32_t>(prompt_lengths, "prompt_lengths");
  const auto responses = vector<std::int32_t>(completion_lengths, "completion_lengths");
  const auto k = integer<std::int64_t>(completions, "completions", 0, kMaxInt32);
  const auto most = integer<std::int64_t>(max_shapes, "max_shapes", 1, kMaxShapes);
  const auto step = static_cast<std::int32_t>(integer<std::int64_t>(multiple, "multiple", 1, kMaxInt32));
  const Shape limit{static_cast<std::int32_t>(integer<std::int64_t>(max_prompt, "max_prompt", 1, kMaxInt32)),
                    static_cast<std::int32_t>(integer<std::int64_t>(max_completion, "max_completion", 0, kMaxInt32))};
  if (prompts.empty()) throw py::value_error("prompt_lengths must have at least one entry, got none");
  check_count("completion_lengths", responses.size(), k == 0 ? 0 : prompts.size());
  std::vector<Shape> shapes;
  {
    check_values(prompts, "prompt_lengths", 1, limit.prompt);
    check_values(responses, "completion_lengths", 0, limit.completion);
    const py::gil_scoped_release release;
    shapes = choose_shapes(prompts, responses, k, static_cast<std::size_t>(most), step, limit);
  }
  return shapes_to(shapes);
}

py::array py_assign_shapes(const py::object& prompt_lengths, const py::object& completion_lengths,
                           const py::object& shapes) {
  const auto prompts = vector<std::int32_t>(prompt_lengths, "prompt_lengths");
  const auto responses = vector<std::int32_t>(completion_lengths, "completion_lengths");
  const std::vector<Shape> chain = shapes_from(shapes);
  if (!responses.empty()) check_count("completion_lengths", responses.size(), prompts.size());
  std::optional<Buffer<std::int32_t>> assigned;
  {
    const py::gil_scoped_release release;
    assigned.emplace(assign_shapes(prompts, responses, chain));
  }
  return to_numpy(std::move(*assigned), {static_cast<py::ssize_t>(prompts.size())});
}

py::tuple py_plan_epoch(const py::object& shape_of, const py::object& num_shapes, const py::object& batch_size,
                        const py::object& seed, const py::object& epoch) {
  const auto assigned = vector<std::int32_t>(shape_of, "shape_of");
  const auto count = integer<std::int64_t>(num_shapes, "num_shapes", 1, kMaxShapes);
  const auto size = integer<std::int64_t>(batch_size, "batch_size", 1, kMaxInt32);
  const auto key = integer<std::uint64_t>(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64));
  if (assigned.empty()) throw py::value_error("shape_of must have at least one entry, got none");
  check_values(assigned, "shape_of", 0, static_cast<std::int32_t>(count) - 1);
  std::optional<Plan> plan;
  {
    const py::gil_scoped_release release;
    plan.emplace(plan_epoch(assigned, static_cast<std::int32_t>(count), size, key, turn));
  }
  const auto batches = static_cast<py::ssize_t>(plan->shapes.size());
  return py::make_tuple(to_numpy(std::move(plan->rows), {batches, size}), to_numpy(std::move(plan->shapes), {batches}));
}

py::tuple py_gather(const std::vector<const Column*>& columns, const py::object& rows, const py::object& width) {
  if (columns.empty()) throw py::value_error("columns must hold at least one column, got none");
  std::vector<const Ragged*> sources;
  for (const Column* column : columns) {
    if (column == nullptr) throw py::type_error("columns must hold Column objects, got None");
    sources.push_back(&column->ragged);
  }
  const auto wanted = vector<std::int64_t>(rows, "rows");
  const auto places = static_cast<std::int32_t>(integer<std::int64_t>(width, "width", 1, kMaxInt32));
  const std::size_t cells = wanted.size() * sources.size();
  if (cells > static_cast<std::size_t>(kMaxInt64) / static_cast<std::size_t>(places)) throw std::bad_alloc();
  std::optional<Buffer<std::int32_t>> tokens;
  std::optional<Buffer<std::int32_t>> lengths;
  {
    const py::gil_scoped_release release;
    tokens.emplace(cells * static_cast<std::size_t>(places));
    lengths.emplace(cells);
    gather(sources, wanted, places, tokens->data(), lengths->data());
  }
  const auto records = static_cast<py::ssize_t>(wanted.size());
  const auto group = static_cast<py::ssize_t>(sources.size());
  return py::make_tuple(to_numpy(std::move(*tokens), {records, group, places}),
                        to_numpy(std::move(*lengths), {records, group}));
}

template <class T>
py::array take(std::span<const T> values, std::span<const std::int64_t> rows) {
  Buffer<T> taken(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t row = rows[i];
    if (row < 0 || row >= static_cast<std::int64_t>(values.size())) {
      throw py::value_error("rows must be in [0, " + std::to_string(values.size()) + "), got " + std::to_string(row));
    }
    taken[i] = values[static_cast<std::size_t>(row)];
  }
  return to_numpy(std::move(taken), {static_cast<py::ssize_t>(rows.size())});
}

py::array py_take(const py::object& values, const py::object& rows) {
  const auto wanted = vector<std::int64_t>(rows, "rows");
  const bool is_float = py::isinstance<py::array>(values) &&
                        py::reinterpret_borrow<py::array>(values).dtype().equal(py::dtype::of<float>());
  return is_float ? take(vector<float>(values, "values"), wanted) : take(vector<std::int64_t>(values, "values"), wanted);
}

Identity identity_from(const py::object& fingerprint, const py::object& records, const py::object& seed,
                       const py::object& batch_size, const py::object& completions, const py::object& shapes) {
  if (!py::isinstance<py::bytes>(fingerprint) || py::len(fingerprint) != kFingerprintBytes) {
    throw py::value_error("fingerprint must be " + std::to_string(kFingerprintBytes) + " bytes, got " +
                          describe(fingerprint));
  }
  Identity identity{};
  const std::string_view digest = py::reinterpret_borrow<py::bytes>(fingerprint);
  std::copy(digest.begin(), digest.end(), identity.fingerprint.begin());
  identity.records = integer<std::uint64_t>(records, "records", 1, static_cast<std::uint64_t>(kMaxInt64));
  identity.seed = integer<std::uint64_t>(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  identity.batch_size = integer<std::uint64_t>(batch_size, "batch_size", 1, static_cast<std::uint64_t>(kMaxInt32));
  identity.completions = static_cast<std::uint32_t>(integer<std::int64_t>(completions, "completions", 0, kMaxInt32));
  identity.shapes = shapes_from(shapes);
  return identity;
}

py::bytes py_encode_state(const py::object& batches, const py::object& fingerprint, const py::object& records,
                          const py::object& seed, const py::object& batch_size, const py::object& completions,
                          const py::object& shapes) {
  const auto position = integer<std::uint64_t>(batches, "batches", 0, static_cast<std::uint64_t>(kMaxInt64));
  return encode_state(identity_from(fingerprint, records, seed, batch_size, completions, shapes), position);
}

std::uint64_t py_decode_state(const py::object& state, const py::object& fingerprint, const py::object& records,
                              const py::object& seed, const py::object& batch_size, const py::object& completions,
                              const py::object& shapes) {
  if (!py::isinstance<py::bytes>(state)) {
    throw py::type_error(std::string("state must be bytes, got ") + Py_TYPE(state.ptr())->tp_name);
  }
  const std::string_view bytes = py::reinterpret_borrow<py::bytes>(state);
  return decode_state(bytes, identity_from(fingerprint, records, seed, batch_size, completions, shapes));
}

// The online side: tournament and pair log ----------------------------------------------------------------------------

template <class T>
py::array copied(const std::vector<T>& values) {
  Buffer<T> buffer(values.size());
  std::copy(values.begin(), values.end(), buffer.data());
  return to_numpy(std::move(buffer), {static_cast<py::ssize_t>(values.size())});
}

Tournament make_tournament(const py::object& prompt_ids, const py::object& k, const py::object& step,
                           const py::object& seed, const py::object& classes) {
  const auto ids = vector<std::int64_t>(prompt_ids, "prompt_ids");
  const auto same = classes.is_none() ? std::span<const std::int32_t>() : vector<std::int32_t>(classes, "classes");
  const auto contestants = integer<std::int64_t>(k, "k", 2, kMaxContestants);
  const auto turn = integer<std::uint64_t>(step, "step", 0, static_cast<std::uint64_t>(kMaxInt64));
  const auto key = integer<std::uint64_t>(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  if (!classes.is_none()) check_count("classes", same.size(), ids.size() * static_cast<std::size_t>(contestants));
  const py::gil_scoped_release release;
  return Tournament(ids, contestants, turn, key, same);
}

py::tuple tournament_questions(const Tournament& tournament) {
  const std::vector<Match>& matches = tournament.questions();
  Buffer<std::int64_t> prompts(matches.size());
  Buffer<std::int32_t> first(matches.size());
  Buffer<std::int32_t> second(matches.size());
  for (std::size_t i = 0; i < matches.size(); ++i) {
    prompts[i] = matches[i].prompt;
    first[i] = matches[i].first;
    second[i] = matches[i].second;
  }
  const auto count = static_cast<py::ssize_t>(matches.size());
  return py::make_tuple(to_numpy(std::move(prompts), {count}), to_numpy(std::move(first), {count}),
                        to_numpy(std::move(second), {count}));
}

void tournament_answer(Tournament& tournament, const py::object& probabilities) {
  tournament.answer(vector<float>(probabilities, "probabilities"));
}

py::tuple tournament_results(const Tournament& tournament) {
  if (!tournament.questions().empty()) {
    throw py::value_error("every question must be answered before there are results, got " +
                          std::to_string(tournament.questions().size()) + " open ones");
  }
  std::vector<std::int8_t> outcomes;
  for (const Outcome outcome : tournament.outcomes()) outcomes.push_back(static_cast<std::int8_t>(outcome));
  return py::make_tuple(copied(tournament.best()), copied(tournament.worst()), copied(tournament.preference()),
                        copied(outcomes), copied(tournament.asked()));
}

// Rows of two borrowed arrays: row i is values[offsets[i]:offsets[i + 1]].
class TokenRows {
 public:
  TokenRows(const py::object& values, const py::object& offsets, const char* name, std::size_t rows)
      : values_(vector<std::int32_t>(values, name)), offsets_(vector<std::int64_t>(offsets, name)) {
    bool fits = offsets_.size() == rows + 1 && offsets_.front() >= 0 &&
                offsets_.back() <= static_cast<std::int64_t>(values_.size());
    for (std::size_t i = 0; fits && i < rows; ++i) fits = offsets_[i] <= offsets_[i + 1];
    if (!fits) {
      throw py::value_error(std::string(name) + " must have " + std::to_string(rows + 1) +
                            " growing offsets in [0, " + std::to_string(values_.size()) + "], got " +
                            std::to_string(offsets_.size()) + " that are not");
    }
  }

  std::span<const std::int32_t> operator[](std::size_t row) const {
    const auto start = static_cast<std::size_t>(offsets_[row]);
    return values_.subspan(start, static_cast<std::size_t>(offsets_[row + 1]) - start);
  }

 private:
  std::span<const std::int32_t> values_;
  std::span<const std::int64_t> offsets_;
};

std::string_view bytes_of(const py::object& object, const char* name) {
  if (!py::isinstance<py::bytes>(object)) {
    throw py::type_error(std::string(name) + " must be bytes, got " + Py_TYPE(object.ptr())->tp_name);
  }
  return py::reinterpret_borrow<py::bytes>(object);
}

std::int64_t step_of(const py::object& step) { return integer<std::int64_t>(step, "step", 0, kMaxInt64); }

std::uint64_t word_of(const py::object& word, const char* name) {
  return integer<std::uint64_t>(word, name, 0, std::numeric_limits<std::uint64_t>::max());
}

py::tuple py_pair_header(const py::object& judge, const py::object& seed) {
  std::string out;
  const std::uint64_t chain = append_header(out, bytes_of(judge, "judge"), word_of(seed, "seed"));
  return py::make_tuple(py::bytes(out), chain);
}

py::tuple py_encode_pairs(const py::object& chain, const py::object& step, const py::object& prompts,
                          const py::object& first_values, const py::object& first_offsets,
                          const py::object& second_values, const py::object& second_offsets,
                          const py::object& preference) {
  std::uint64_t last = word_of(chain, "chain");
  const std::int64_t turn = step_of(step);
  const auto ids = vector<std::int64_t>(prompts, "prompts");
  const TokenRows first(first_values, first_offsets, "first", ids.size());
  const TokenRows second(second_values, second_offsets, "second", ids.size());
  const auto answers = vector<float>(preference, "preference");
  check_count("preference", answers.size(), ids.size());
  std::string out;
  {
    const py::gil_scoped_release release;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      last = append_pair(out, last, {turn, ids[i], answers[i], first[i], second[i]});
    }
  }
  return py::make_tuple(py::bytes(out), last);
}

// Judge, seed and end of what is whole, and steps, prompts, answers and tokens of its records.
py::tuple py_decode_pairs(const py::object& data) {
  const std::string_view bytes = bytes_of(data, "data");
  std::vector<std::int64_t> steps, prompts, lengths;
  std::vector<float> preference;
  std::vector<std::int32_t> tokens;
  std::optional<PairReader> reader;
  {
    const py::gil_scoped_release release;
    reader.emplace(bytes);
    while (const std::optional<JudgedPair> pair = reader->next()) {
      steps.push_back(pair->step);
      prompts.push_back(pair->prompt);
      preference.push_back(pair->preference);
      for (const auto& side : {pair->first, pair->second}) {
        lengths.push_back(static_cast<std::int64_t>(side.size()));
        tokens.insert(tokens.end(), side.begin(), side.end());
      }
    }
  }
  return py::make_tuple(py::bytes(reader->judge()), reader->seed(), reader->end(), copied(steps), copied(prompts),
                        copied(preference), copied(lengths), copied(tokens));
}

// Number of records and end of what is whole; those of this judge and seed from `first_step` on are added.
py::tuple index_scan(PairIndex& index, const py::object& data, const py::object& judge, const py::object& seed,
                     const py::object& first_step) {
  const std::string_view bytes = bytes_of(data, "data");
  const std::string_view name = bytes_of(judge, "judge");
  const std::uint64_t key = word_of(seed, "seed");
  const std::int64_t first = integer<std::int64_t>(first_step, "first_step", 0, kMaxInt64);
  // Under the GIL, as is all that changes an object: threads must not meet inside it.
  PairReader reader(bytes);
  const bool ours = reader.judge() == name && reader.seed() == key;
  while (const std::optional<JudgedPair> pair = reader.next()) {
    if (ours && pair->step >= first) index.add(*pair);
  }
  return py::make_tuple(reader.records(), reader.end());
}

void index_add(PairIndex& index, const py::object& step, const py::object& prompts, const py::object& first_values,
               const py::object& first_offsets, const py::object& second_values, const py::object& second_offsets,
               const py::object& preference) {
  const std::int64_t turn = step_of(step);
  const auto ids = vector<std::int64_t>(prompts, "prompts");
  const TokenRows first(first_values, first_offsets, "first", ids.size());
  const TokenRows second(second_values, second_offsets, "second", ids.size());
  const auto answers = vector<float>(preference, "preference");
  check_count("preference", answers.size(), ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) index.add({turn, ids[i], answers[i], first[i], second[i]});
}

// p of each pair, NaN where there is none.
py::array index_find(const PairIndex& index, const py::object& step, const py::object& prompts,
                     const py::object& first_values, const py::object& first_offsets, const py::object& second_values,
                     const py::object& second_offsets) {
  const std::int64_t turn = step_of(step);
  const auto ids = vector<std::int64_t>(prompts, "prompts");
  const TokenRows first(first_values, first_offsets, "first", ids.size());
  const TokenRows second(second_values, second_offsets, "second", ids.size());
  std::vector<float> found(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    found[i] = index.find(turn, ids[i], first[i], second[i]).value_or(std::numeric_limits<float>::quiet_NaN());
  }
  return copied(found);
}

void define_online_side(py::module_& module) {
  py::class_<Tournament>(module, "Tournament")
      .def(py::init(&make_tournament), py::arg("prompt_ids"), py::kw_only(), py::arg("k"), py::arg("step"),
           py::arg("seed"), py::arg("classes") = py::none())
      .def("questions", &tournament_questions)
      .def("answer", &tournament_answer, py::arg("probabilities"))
      .def("results", &tournament_results);

  py::class_<PairIndex>(module, "PairIndex")
      .def(py::init<>())
      .def("__len__", &PairIndex::size)
      .def("scan", &index_scan, py::arg("data"), py::kw_only(), py::arg("judge"), py::arg("seed"),
           py::arg("first_step"))
      .def("add", &index_add, py::arg("step"), py::arg("prompts"), py::arg("first_values"), py::arg("first_offsets"),
           py::arg("second_values"), py::arg("second_offsets"), py::arg("preference"))
      .def("find", &index_find, py::arg("step"), py::arg("prompts"), py::arg("first_values"),
           py::arg("first_offsets"), py::arg("second_values"), py::arg("second_offsets"))
      .def(
          "forget_before",
          [](PairIndex& index, const py::object& step) { index.forget_before(step_of(step)); }, py::arg("step"));

  module.def("pair_header", &py_pair_header, py::arg("judge"), py::arg("seed"));
  module.def("encode_pairs", &py_encode_pairs, py::arg("chain"), py::arg("step"), py::arg("prompts"),
             py::arg("first_values"), py::arg("first_offsets"), py::arg("second_values"), py::arg("second_offsets"),
             py::arg("preference"));
  module.def("decode_pairs", &py_decode_pairs, py::arg("data"));
}

}  // namespace

PYBIND11_MODULE(_batcher, module, py::mod_gil_not_used()) {
  module.doc() = "Native core of fastpref.data, which alone may import it; its typed face is _batcher.pyi.";

  py::class_<Column>(module, "Column")
      .def(py::init(&make_column), py::arg("values"), py::arg("offsets"), py::kw_only(),
           py::arg("vocab_size") = py::none())
      .def("__len__", [](const Column& column) { return column.ragged.rows(); })
      .def("lengths", &column_lengths);

  module.def("choose_shapes", &py_choose_shapes, py::arg("prompt_lengths"), py::arg("completion_lengths"),
             py::kw_only(), py::arg("completions"), py::arg("max_shapes"), py::arg("multiple"), py::arg("max_prompt"),
             py::arg("max_completion"));
  module.def("assign_shapes", &py_assign_shapes, py::arg("prompt_lengths"), py::arg("completion_lengths"),
             py::arg("shapes"));
  module.def("plan_epoch", &py_plan_epoch, py::arg("shape_of"), py::kw_only(), py::arg("num_shapes"),
             py::arg("batch_size"), py::arg("seed"), py::arg("epoch"));
  module.def("gather", &py_gather, py::arg("columns"), py::arg("rows"), py::arg("width"));
  module.def("take", &py_take, py::arg("values"), py::arg("rows"));
  module.def("encode_state", &py_encode_state, py::arg("batches"), py::kw_only(), py::arg("fingerprint"),
             py::arg("records"), py::arg("seed"), py::arg("batch_size"), py::arg("completions"), py::arg("shapes"));
  module.def("decode_state", &py_decode_state, py::arg("state"), py::kw_only(), py::arg("fingerprint"),
             py::arg("records"), py::arg("seed"), py::arg("batch_size"), py::arg("completions"), py::arg("shapes"));

  define_online_side(module);
}

}  // namespace fastpref
