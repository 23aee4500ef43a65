// The only file that knows of Python. It checks every argument, releases the GIL around the work, and hands memory over
// as read-only arrays that own it. Arrays given to a function must not be written to while it runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "assemble.h"
#include "buffer.h"
#include "loader.h"
#include "packed.h"
#include "pair_plan.h"
#include "pair_state.h"
#include "plan.h"
#include "random.h"
#include "state.h"

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

// A contiguous array of exactly T and that many dimensions, borrowed: `object` must outlive the span.
template <class T>
std::span<const T> contiguous(py::handle object, const char* name, py::ssize_t dimensions,
                              std::vector<py::ssize_t>* shape = nullptr) {
  const auto rule = [&] {
    return std::string(name) + " must be a contiguous array of " +
           (dimensions == 1 ? "one dimension" : std::to_string(dimensions) + " dimensions") + " and type " +
           py::str(py::dtype::of<T>()).template cast<std::string>() + ", got ";
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
void read_only(py::array& array) {
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
}

template <class T>
py::array to_numpy(Buffer<T>&& buffer, const std::vector<py::ssize_t>& shape) {
  T* data = buffer.data();
  const py::capsule owner(data, [](void* pointer) { Free{}(pointer); });
  buffer.release();
  py::array array(py::dtype::of<T>(), shape, data, owner);
  read_only(array);
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

std::array<unsigned char, kFingerprintBytes> digest(const py::object& object, const char* name) {
  if (!py::isinstance<py::bytes>(object) || py::len(object) != kFingerprintBytes) {
    throw py::value_error(std::string(name) + " must be " + std::to_string(kFingerprintBytes) + " bytes, got " +
                          describe(object));
  }
  std::array<unsigned char, kFingerprintBytes> bytes{};
  const std::string_view view = py::reinterpret_borrow<py::bytes>(object);
  std::copy(view.begin(), view.end(), bytes.begin());
  return bytes;
}

Identity identity_from(const py::object& fingerprint, const py::object& records, const py::object& seed,
                       const py::object& batch_size, const py::object& completions, const py::object& shapes) {
  Identity identity{};
  identity.fingerprint = digest(fingerprint, "fingerprint");
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

// ---------------------------------------------------------------------------------------------------------------------
// Packed pairs.

Layout layout_from(py::handle layout, py::handle start_token) {
  const std::string rule = "layout must be 'shared', 'separate' or 'encoder-decoder', got ";
  if (!py::isinstance<py::str>(layout)) throw py::type_error(rule + describe(layout));
  const auto name = layout.cast<std::string>();
  const auto start = static_cast<std::int32_t>(integer<std::int64_t>(start_token, "decoder_start", 0, kMaxInt32));
  if (name == "shared") return {Style::kShared, start};
  if (name == "separate") return {Style::kSeparate, start};
  if (name == "encoder-decoder") return {Style::kEncoderDecoder, start};
  throw py::value_error(rule + describe(layout));
}

std::int32_t max_pairs_from(py::handle object, std::int64_t rows) {
  const auto most = static_cast<std::int32_t>(integer<std::int64_t>(object, "max_pairs_per_row", 1, kMaxInt32));
  if (rows > (kMaxInt32 / 2) / most) {
    throw py::value_error("rows * max_pairs_per_row must be below 2^30, got " + std::to_string(rows) + " * " +
                          std::to_string(most));
  }
  return most;
}

PackConfig pack_config_from(py::handle shapes, py::handle max_pairs, py::handle window, py::handle seed, bool encoder) {
  const std::string rule = "shapes must be 1 to " + std::to_string(kMaxRowShapes) +
                           " triples (rows, decoder places, encoder places), no row smaller than the one before in "
                           "either stream and no two equal, encoder places 0 exactly without an encoder, got ";
  if (!py::isinstance<py::sequence>(shapes) || py::isinstance<py::str>(shapes)) {
    throw py::type_error(rule + describe(shapes));
  }
  PackConfig config{};
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
      const Size before = config.shapes.back().capacity;
      chain = chain && fits(before, shape.capacity) && before != shape.capacity;
    }
    most_rows = std::max<std::int64_t>(most_rows, shape.rows);
    config.shapes.push_back(shape);
  }
  if (!chain || config.shapes.empty() || config.shapes.size() > kMaxRowShapes) {
    throw py::value_error(rule + describe(shapes));
  }
  config.max_pairs = max_pairs_from(max_pairs, most_rows);
  config.window = static_cast<std::int32_t>(integer<std::int64_t>(window, "window", 1, kMaxWindow));
  config.seed = integer<std::uint64_t>(seed, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  return config;
}

// The arrays of a batch, in the order of Field; together they own its memory.
py::tuple packed_to_numpy(PackedBatch&& batch) {
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

Size size_of(const Layout& layout, const Pair& pair, std::int64_t record) {
  for (const auto tokens : {pair.prompt, pair.completions[0], pair.completions[1]}) {
    if (tokens.empty()) {
      throw std::invalid_argument("prompts and completions must have at least one token, got none at record " +
                                  std::to_string(record));
    }
  }
  return size_of(layout, pair.prompt.size(), pair.completions[0].size(), pair.completions[1].size());
}

// Decoder and encoder places that each pair takes, [records, 2].
py::array py_pair_sizes(const Column& prompts, const Column& first, const Column& second, const py::object& layout) {
  const Layout style = layout_from(layout, py::int_(0));
  const std::int64_t count = prompts.ragged.rows();
  check_count("first", static_cast<std::size_t>(first.ragged.rows()), static_cast<std::size_t>(count));
  check_count("second", static_cast<std::size_t>(second.ragged.rows()), static_cast<std::size_t>(count));
  Buffer<std::int32_t> sizes(2 * static_cast<std::size_t>(count));
  {
    const py::gil_scoped_release release;
    for (std::int64_t i = 0; i < count; ++i) {
      const Pair pair{prompts.ragged.row(i), {first.ragged.row(i), second.ragged.row(i)}, {}, 0, 0};
      const Size size = size_of(style, pair, i);
      sizes[static_cast<std::size_t>(2 * i)] = size.tokens;
      sizes[static_cast<std::size_t>(2 * i + 1)] = size.prompt;
    }
  }
  return to_numpy(std::move(sizes), {count, 2});
}

py::tuple py_plan_pairs(const py::object& tokens, const py::object& prompt_tokens, const py::object& shapes,
                        const py::object& max_pairs, const py::object& window, const py::object& seed,
                        const py::object& epoch) {
  const auto decoder = vector<std::int32_t>(tokens, "tokens");
  const auto encoder = vector<std::int32_t>(prompt_tokens, "prompt_tokens");
  if (decoder.empty() || decoder.size() >= static_cast<std::size_t>(kMaxInt32)) {
    throw py::value_error("tokens must have 1 to 2^31 - 2 entries, got " + std::to_string(decoder.size()));
  }
  if (!encoder.empty()) check_count("prompt_tokens", encoder.size(), decoder.size());
  const PackConfig config = pack_config_from(shapes, max_pairs, window, seed, !encoder.empty());
  const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64));
  std::vector<Size> sizes(decoder.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sizes[i] = {decoder[i], encoder.empty() ? 0 : encoder[i]};
    if (sizes[i].tokens < 1 || sizes[i].prompt < 0 || shape_of(sizes[i], config.shapes) < 0) {
      throw py::value_error("tokens must be at least 1 and fit the last shape, got " + std::to_string(sizes[i].tokens) +
                            " and " + std::to_string(sizes[i].prompt) + " at " + std::to_string(i));
    }
  }
  std::optional<PairPlan> plan;
  Buffer<std::int32_t> members(sizes.size());
  std::optional<Buffer<std::int64_t>> ends, batches;
  {
    const py::gil_scoped_release release;
    plan.emplace(plan_pairs(sizes, config, turn));
    std::copy(plan->rows.pairs.begin(), plan->rows.pairs.end(), members.data());
    ends.emplace(plan->rows.ends.size());
    std::copy(plan->rows.ends.begin(), plan->rows.ends.end(), ends->data());
    batches.emplace(3 * plan->batches.size());
    for (std::size_t i = 0; i < plan->batches.size(); ++i) {
      (*batches)[3 * i] = plan->batches[i].first_row;
      (*batches)[3 * i + 1] = plan->batches[i].rows;
      (*batches)[3 * i + 2] = plan->batches[i].shape;
    }
  }
  const auto rows = static_cast<py::ssize_t>(plan->rows.ends.size());
  const auto number = static_cast<py::ssize_t>(plan->batches.size());
  return py::make_tuple(to_numpy(std::move(members), {static_cast<py::ssize_t>(sizes.size())}),
                        to_numpy(std::move(*ends), {rows}), to_numpy(std::move(*batches), {number, 3}), plan->hash);
}

// The arrays that `Loader` borrows from, and the loader. In a child of fork the loader is left where it is.
class PairLoader {
 public:
  PairLoader(const py::object& prompts, const py::object& first, const py::object& second, const py::object& preference,
             const py::object& ref_logps, const py::object& ids, const py::object& layout, const py::object& start_token,
             const py::object& shapes, const py::object& max_pairs, const py::object& window, const py::object& seed,
             const py::object& records, const py::object& host, const py::object& hosts,
             const py::object& threads, const py::object& prefetch, const py::object& fingerprint,
             const py::object& tokenizer, const py::object& poison)
      : kept_(py::make_tuple(prompts, first, second, preference, ref_logps, ids)) {
    PairSource source{&column(prompts, "prompts"), &column(first, "first"), &column(second, "second"),
                      vector<float>(preference, "preference"), contiguous<float>(ref_logps, "ref_logps", 1),
                      vector<std::int64_t>(ids, "ids")};
    const std::size_t count = source.ids.size();
    if (count == 0 || count >= static_cast<std::size_t>(kMaxInt32)) {
      throw py::value_error("ids must have 1 to 2^31 - 2 entries, got " + std::to_string(count));
    }
    check_count("prompts", static_cast<std::size_t>(source.prompts->rows()), count);
    check_count("first", static_cast<std::size_t>(source.first->rows()), count);
    check_count("second", static_cast<std::size_t>(source.second->rows()), count);
    check_count("preference", source.preference.size(), count);
    if (!source.ref_logps.empty() && source.ref_logps.size() != 2 * count) {
      throw py::value_error("ref_logps must have no entry, or two for each of the " + std::to_string(count) +
                            " records, got " + std::to_string(source.ref_logps.size()));
    }
    LoaderConfig config{};
    config.layout = layout_from(layout, start_token);
    config.pack = pack_config_from(shapes, max_pairs, window, seed, config.layout.style == Style::kEncoderDecoder);
    config.hosts = static_cast<std::int32_t>(integer<std::int64_t>(hosts, "hosts", 1, kMaxInt32));
    config.host = static_cast<std::int32_t>(integer<std::int64_t>(host, "host", 0, config.hosts - 1));
    for (const RowShape& shape : config.pack.shapes) {
      if (shape.rows % config.hosts != 0) {
        throw py::value_error("hosts must divide the rows of every shape, got " + std::to_string(config.hosts) +
                              " hosts and " + std::to_string(shape.rows) + " rows");
      }
    }
    config.threads = static_cast<std::int32_t>(integer<std::int64_t>(threads, "threads", 1, 256));
    config.prefetch = static_cast<std::int32_t>(integer<std::int64_t>(prefetch, "prefetch", 0, 1024));
    config.poison = flag(poison, "poison");
    const auto chosen = vector<std::int32_t>(records, "records");
    identity_.fingerprint = digest(fingerprint, "fingerprint");
    identity_.tokenizer = digest(tokenizer, "tokenizer");
    identity_.layout = config.layout;
    identity_.pack = config.pack;

    const py::gil_scoped_release release;
    std::vector<std::int32_t> kept(chosen.begin(), chosen.end());
    std::vector<Size> sizes;
    const std::size_t number = kept.empty() ? count : kept.size();
    sizes.reserve(number);
    for (std::size_t i = 0; i < number; ++i) {
      const std::int64_t record = kept.empty() ? static_cast<std::int64_t>(i) : kept[i];
      if (record < 0 || record >= static_cast<std::int64_t>(count)) {
        throw std::invalid_argument("records must be in [0, " + std::to_string(count) + "), got " +
                                    std::to_string(record));
      }
      sizes.push_back(size_of(config.layout, source.pair(record), record));
      if (shape_of(sizes.back(), config.pack.shapes) < 0) {
        throw std::invalid_argument("the last of shapes must hold every pair, got record " + std::to_string(record) +
                                    " with " + std::to_string(sizes.back().tokens) + " and " +
                                    std::to_string(sizes.back().prompt) + " places");
      }
    }
    identity_.pairs = number;
    loader_ = std::unique_ptr<Loader, Leave>(new Loader(source, std::move(kept), std::move(sizes), config));
  }

  py::tuple next() {
    std::optional<PackedBatch> batch;
    while (true) {
      {
        const py::gil_scoped_release release;
        batch = loader_->next(std::chrono::milliseconds(50));
      }
      if (batch) return packed_to_numpy(std::move(*batch));
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  // Epoch, batches handed over in it, batches in it.
  py::tuple position() {
    Standing now{};
    {
      const py::gil_scoped_release release;
      now = loader_->standing();
    }
    return py::make_tuple(now.position.epoch, now.position.batch, now.batches);
  }

  // Batches and rows of an epoch, decoder places in them, and how many of those hold a token.
  py::tuple measure(const py::object& epoch) {
    const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64));
    std::shared_ptr<const PairPlan> plan;
    {
      const py::gil_scoped_release release;
      plan = loader_->plan(turn);
    }
    std::int64_t places = 0;
    for (const PairBatchPlan& batch : plan->batches) {
      const RowShape& shape = identity_.pack.shapes[static_cast<std::size_t>(batch.shape)];
      places += static_cast<std::int64_t>(shape.rows) * shape.capacity.tokens;
    }
    return py::make_tuple(plan->batches.size(), plan->rows.ends.size(), places, loader_->tokens());
  }

  py::bytes state() {
    std::string bytes;
    {
      const py::gil_scoped_release release;
      const Standing now = loader_->standing();
      bytes = encode_pair_state(
          identity_, {now.position.epoch, static_cast<std::uint64_t>(now.position.batch), now.plan});
    }
    return bytes;
  }

  void restore(const py::object& state) {
    if (!py::isinstance<py::bytes>(state)) {
      throw py::type_error(std::string("state must be bytes, got ") + Py_TYPE(state.ptr())->tp_name);
    }
    const std::string_view bytes = py::reinterpret_borrow<py::bytes>(state);
    const py::gil_scoped_release release;
    const PairState saved = decode_pair_state(bytes, identity_);
    const auto plan = loader_->plan(saved.epoch);
    if (saved.plan != plan->hash || saved.batch > plan->batches.size()) {
      throw std::invalid_argument("state is of another plan: saved " + std::to_string(saved.plan) + " at batch " +
                                  std::to_string(saved.batch) + ", this batcher has " + std::to_string(plan->hash) +
                                  " with " + std::to_string(plan->batches.size()) +
                                  " batches; restore with what it was saved with, or start anew");
    }
    loader_->seek({{saved.epoch, static_cast<std::int64_t>(saved.batch)},
                   static_cast<std::int64_t>(plan->batches.size()), plan->hash});
  }

  void close() {
    const py::gil_scoped_release release;
    loader_->close();
  }

 private:
  struct Leave {
    void operator()(Loader* loader) const {
      const py::gil_scoped_release release;
      if (!loader->forked()) delete loader;
    }
  };

  static const Ragged& column(py::handle object, const char* name) {
    if (!py::isinstance<Column>(object)) {
      throw py::type_error(std::string(name) + " must be a Column, got " + Py_TYPE(object.ptr())->tp_name);
    }
    return object.cast<const Column&>().ragged;
  }

  static bool flag(py::handle object, const char* name) {
    if (!py::isinstance<py::bool_>(object)) throw py::type_error(std::string(name) + " must be a bool, got " + describe(object));
    return object.cast<bool>();
  }

  py::tuple kept_;
  PairIdentity identity_{};
  std::unique_ptr<Loader, Leave> loader_;
};

py::tuple py_pack_step(const py::object& prompt_tokens, const py::object& prompt_lengths,
                       const py::object& completion_tokens, const py::object& completion_lengths,
                       const py::object& preference, const py::object& ref_logps, const py::object& scores,
                       const py::object& where, const py::object& ids, const py::object& layout, const py::object& start_token,
                       const py::object& row_tokens, const py::object& prompt_row_tokens, const py::object& max_pairs,
                       const py::object& row_counts) {
  std::vector<py::ssize_t> prompt_sides, sides, length_sides, logp_sides, score_sides;
  const auto prompts = contiguous<std::int32_t>(prompt_tokens, "prompt_tokens", 2, &prompt_sides);
  const auto count = static_cast<std::size_t>(prompt_sides[0]);
  const auto prompt_ends = vector<std::int32_t>(prompt_lengths, "prompt_lengths");
  const auto tokens = contiguous<std::int32_t>(completion_tokens, "completion_tokens", 3, &sides);
  const auto ends = contiguous<std::int32_t>(completion_lengths, "completion_lengths", 2, &length_sides);
  const auto chances = vector<float>(preference, "preference");
  const auto logps = contiguous<float>(ref_logps, "ref_logps", 2, &logp_sides);
  const auto given = contiguous<float>(scores, "scores", 2, &score_sides);
  const auto wanted = vector<bool>(where, "where");
  const auto names = vector<std::int64_t>(ids, "ids");
  const auto group = static_cast<std::size_t>(sides[1]);
  if (group != 1 && group != 2) {
    throw py::value_error("completion_tokens must hold 1 or 2 completions of each prompt, got " + std::to_string(group));
  }
  check_count("prompt_lengths", prompt_ends.size(), count);
  check_count("completion_tokens", static_cast<std::size_t>(sides[0]), count);
  if (length_sides[0] != sides[0] || length_sides[1] != sides[1]) {
    throw py::value_error("completion_lengths must have one entry for each of the " + std::to_string(sides[0]) + " x " +
                          std::to_string(sides[1]) + " completions, got " + std::to_string(length_sides[0]) + " x " +
                          std::to_string(length_sides[1]));
  }
  check_count("preference", chances.size(), count);
  for (const auto& [name, sides_of] : {std::pair{"ref_logps", &logp_sides}, std::pair{"scores", &score_sides}}) {
    check_count(name, static_cast<std::size_t>((*sides_of)[0]), count);
    if ((*sides_of)[1] != 2) {
      throw py::value_error(std::string(name) + " must have two entries for each record, got " +
                            std::to_string((*sides_of)[1]));
    }
  }
  check_count("where", wanted.size(), count);
  check_count("ids", names.size(), count);
  const Layout places = layout_from(layout, start_token);
  const bool encoder = places.style == Style::kEncoderDecoder;
  const Size capacity{
      static_cast<std::int32_t>(integer<std::int64_t>(row_tokens, "row_tokens", 1, kMaxRowTokens)),
      static_cast<std::int32_t>(integer<std::int64_t>(prompt_row_tokens, "prompt_row_tokens", encoder, encoder ? kMaxRowTokens : 0))};
  if (!py::isinstance<py::sequence>(row_counts) || py::isinstance<py::str>(row_counts) || py::len(row_counts) == 0) {
    throw py::type_error("row_counts must be a sequence of at least one integer, got " + describe(row_counts));
  }
  std::vector<std::int32_t> numbers;
  for (const py::handle number : py::reinterpret_borrow<py::sequence>(row_counts)) {
    numbers.push_back(static_cast<std::int32_t>(integer<std::int64_t>(number, "row_counts", 1, kMaxInt32 / 2)));
  }
  std::sort(numbers.begin(), numbers.end());
  const std::int32_t most = max_pairs_from(max_pairs, numbers.back());

  std::optional<Buffer<std::int32_t>> slots;
  std::optional<PackedBatch> batch;
  {
    const py::gil_scoped_release release;
    const auto span = [](std::span<const std::int32_t> table, std::int64_t width, std::size_t row, std::int32_t length) {
      return table.subspan(row * static_cast<std::size_t>(width), static_cast<std::size_t>(length));
    };
    std::vector<Pair> pairs(count);
    std::vector<Size> sizes(count);
    std::vector<std::int32_t> kept;
    for (std::size_t i = 0; i < count; ++i) {
      if (!wanted[i]) continue;
      const auto refuse = [&](const std::string& rule, const std::string& got) {
        throw py::value_error(rule + ", got " + got + " at record " + std::to_string(i));
      };
      if (prompt_ends[i] < 1 || prompt_ends[i] > prompt_sides[1]) {
        refuse("prompt_lengths must be in [1, " + std::to_string(prompt_sides[1]) + "]", std::to_string(prompt_ends[i]));
      }
      Pair pair{span(prompts, prompt_sides[1], i, prompt_ends[i]), {}, {logps[2 * i], logps[2 * i + 1]}, chances[i],
                names[i], {given[2 * i], given[2 * i + 1]}};
      for (std::size_t k = 0; k < group; ++k) {
        const std::int32_t length = ends[i * group + k];
        if (length < 1 || length > sides[2]) {
          refuse("completion_lengths must be in [1, " + std::to_string(sides[2]) + "]", std::to_string(length));
        }
        pair.completions[k] = span(tokens, sides[2], i * group + k, length);
      }
      for (const auto ids_of : {pair.prompt, pair.completions[0], pair.completions[1]}) {
        for (const std::int32_t token : ids_of) {
          if (token < 0) refuse("token ids must be in [0, 2^31)", std::to_string(token));
        }
      }
      if (!(chances[i] >= 0 && chances[i] <= 1)) refuse("preference must be in [0, 1]", std::to_string(chances[i]));
      sizes[i] = size_of(places, pair.prompt.size(), pair.completions[0].size(), pair.completions[1].size());
      if (!fits(sizes[i], capacity)) {
        refuse("row_tokens and prompt_row_tokens must hold every pair whole",
               std::to_string(capacity.tokens) + " and " + std::to_string(capacity.prompt) + " and a pair of " +
                   std::to_string(sizes[i].tokens) + " and " + std::to_string(sizes[i].prompt) + " places");
      }
      pairs[i] = pair;
      kept.push_back(static_cast<std::int32_t>(i));
    }
    Rows rows;
    Packer packer(capacity, most);
    for (std::size_t at = 0; at < kept.size(); at += kMaxWindow) {
      packer.pack(std::span(kept).subspan(at, std::min<std::size_t>(kMaxWindow, kept.size() - at)), sizes, rows);
    }
    const auto number = std::lower_bound(numbers.begin(), numbers.end(), static_cast<std::int64_t>(rows.ends.size()));
    if (number == numbers.end()) {
      throw py::value_error("row_counts must reach the rows that are needed, got at most " +
                            std::to_string(numbers.back()) + " and " + std::to_string(rows.ends.size()) +
                            " rows of pairs");
    }
    const PackedShape shape{*number, capacity.tokens, capacity.prompt, most};
    batch.emplace(PackedBatch{
        shape, std::make_unique<Lease>(std::make_shared<SlabPool>(0, false), offsets_of(shape).bytes)});
    slots.emplace(count);
    std::fill_n(slots->data(), count, -1);
    PackedWriter writer(places, shape, 0, batch->memory->data());
    std::vector<Pair> row_pairs;
    for (std::int32_t row = 0; row < shape.rows; ++row) {
      row_pairs.clear();
      if (static_cast<std::size_t>(row) < rows.ends.size()) {
        for (std::int64_t at = row == 0 ? 0 : rows.ends[row - 1]; at < rows.ends[row]; ++at) {
          (*slots)[rows.pairs[at]] = row * most + static_cast<std::int32_t>(row_pairs.size());
          row_pairs.push_back(pairs[rows.pairs[at]]);
        }
      }
      writer.write(row_pairs);
    }
  }
  return py::make_tuple(packed_to_numpy(std::move(*batch)),
                        to_numpy(std::move(*slots), {static_cast<py::ssize_t>(count)}));
}

void add_pairs(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Cancelled&) {
      PyErr_SetString(PyExc_ValueError, "a batcher must be open to hand out batches, got a closed one; make another");
    }
  });
  py::class_<PairLoader>(module, "PairLoader")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, const py::object&>(),
           py::arg("prompts"), py::arg("first"), py::arg("second"), py::arg("preference"), py::arg("ref_logps"),
           py::arg("ids"), py::kw_only(), py::arg("layout"), py::arg("decoder_start"), py::arg("shapes"),
           py::arg("max_pairs_per_row"), py::arg("window"), py::arg("seed"), py::arg("records"), py::arg("host"),
           py::arg("hosts"), py::arg("threads"), py::arg("prefetch"), py::arg("fingerprint"), py::arg("tokenizer"),
           py::arg("poison") = false)
      .def("next", &PairLoader::next)
      .def("position", &PairLoader::position)
      .def("measure", &PairLoader::measure, py::arg("epoch"))
      .def("state", &PairLoader::state)
      .def("restore", &PairLoader::restore, py::arg("state"))
      .def("close", &PairLoader::close);
  module.def("pair_sizes", &py_pair_sizes, py::arg("prompts"), py::arg("first"), py::arg("second"), py::kw_only(),
             py::arg("layout"));
  module.def("plan_pairs", &py_plan_pairs, py::arg("tokens"), py::arg("prompt_tokens"), py::kw_only(),
             py::arg("shapes"), py::arg("max_pairs_per_row"), py::arg("window"), py::arg("seed"), py::arg("epoch"));
  module.def("pack_step", &py_pack_step, py::arg("prompt_tokens"), py::arg("prompt_lengths"),
             py::arg("completion_tokens"), py::arg("completion_lengths"), py::arg("preference"), py::arg("ref_logps"),
             py::arg("scores"), py::arg("where"), py::arg("ids"), py::kw_only(), py::arg("layout"), py::arg("decoder_start"),
             py::arg("row_tokens"), py::arg("prompt_row_tokens"), py::arg("max_pairs_per_row"), py::arg("row_counts"));
}

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() = "Native core of fastpref.data, which alone may import it; its typed face is _native.pyi.";

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

  add_pairs(module);
}

}  // namespace fastpref
