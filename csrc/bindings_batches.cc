// Packed batches of a data set, and the packing of one online step.
#include "bindings.h"

#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>

#include "pack_step.h"
#include "random.h"

namespace fastpref {
namespace {

Size size_of(const Layout& layout, const Pair& pair, std::int64_t record) {
  for (const auto tokens : {pair.prompt, pair.completions[0], pair.completions[1]}) {
    if (tokens.empty()) {
      throw std::invalid_argument("prompts and completions must have at least one token, but received none at record " +
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
                        const py::object& batch_pairs, const py::object& max_pairs, const py::object& window,
                        const py::object& seed, const py::object& epoch) {
  const auto decoder = vector<std::int32_t>(tokens, "tokens");
  const auto encoder = vector<std::int32_t>(prompt_tokens, "prompt_tokens");
  if (decoder.empty() || decoder.size() >= static_cast<std::size_t>(kMaxInt32)) {
    throw py::value_error("tokens must have 1 to 2^31 - 2 entries, but received " + std::to_string(decoder.size()));
  }
  if (!encoder.empty()) check_count("prompt_tokens", encoder.size(), decoder.size());
  const PackConfig config = pack_config_from(shapes, batch_pairs, max_pairs, window, seed, !encoder.empty());
  const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64));
  std::vector<Size> sizes(decoder.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sizes[i] = {decoder[i], encoder.empty() ? 0 : encoder[i]};
    if (sizes[i].tokens < 1 || sizes[i].prompt < 0 || shape_of(sizes[i], config.shapes) < 0) {
      throw py::value_error("tokens must be at least 1 and fit the last shape, but received " + std::to_string(sizes[i].tokens) +
                            " and " + std::to_string(sizes[i].prompt) + " at " + std::to_string(i));
    }
  }
  std::optional<PairPlan> plan;
  std::optional<Buffer<std::int32_t>> members;
  std::optional<Buffer<std::int64_t>> ends, batches;
  {
    const py::gil_scoped_release release;
    plan.emplace(plan_pairs(sizes, config, turn));
    members.emplace(plan->rows.pairs.size());
    std::copy(plan->rows.pairs.begin(), plan->rows.pairs.end(), members->data());
    ends.emplace(plan->rows.ends.size());
    std::copy(plan->rows.ends.begin(), plan->rows.ends.end(), ends->data());
    batches.emplace(3 * plan->batches.size());
    for (std::size_t i = 0; i < plan->batches.size(); ++i) {
      (*batches)[3 * i] = plan->batches[i].first_row;
      (*batches)[3 * i + 1] = plan->batches[i].rows;
      (*batches)[3 * i + 2] = plan->batches[i].shape;
    }
  }
  const auto pairs = static_cast<py::ssize_t>(plan->rows.pairs.size());
  const auto rows = static_cast<py::ssize_t>(plan->rows.ends.size());
  const auto number = static_cast<py::ssize_t>(plan->batches.size());
  return py::make_tuple(to_numpy(std::move(*members), {pairs}),
                        to_numpy(std::move(*ends), {rows}), to_numpy(std::move(*batches), {number, 3}), plan->hash);
}

// The arrays that `Loader` borrows from, and the loader. In a child of fork the loader is left where it is.
class PairLoader {
 public:
  PairLoader(const py::object& prompts, const py::object& first, const py::object& second, const py::object& preference,
             const py::object& ref_logps, const py::object& ids, const py::object& layout, const py::object& start_token,
             const py::object& shapes, const py::object& batch_pairs, const py::object& max_pairs,
             const py::object& window, const py::object& seed, const py::object& records, const py::object& host, const py::object& hosts,
             const py::object& threads, const py::object& prefetch)
      : kept_(py::make_tuple(prompts, first, second, preference, ref_logps, ids)) {
    PairSource source{&column(prompts, "prompts"), &column(first, "first"), &column(second, "second"),
                      vector<float>(preference, "preference"), contiguous<float>(ref_logps, "ref_logps", 1),
                      vector<std::int64_t>(ids, "ids")};
    const std::size_t count = source.ids.size();
    if (count == 0 || count >= static_cast<std::size_t>(kMaxInt32)) {
      throw py::value_error("ids must have 1 to 2^31 - 2 entries, but received " + std::to_string(count));
    }
    check_count("prompts", static_cast<std::size_t>(source.prompts->rows()), count);
    check_count("first", static_cast<std::size_t>(source.first->rows()), count);
    check_count("second", static_cast<std::size_t>(source.second->rows()), count);
    check_count("preference", source.preference.size(), count);
    if (!source.ref_logps.empty() && source.ref_logps.size() != 2 * count) {
      throw py::value_error("ref_logps must have no entry, or two for each of the " + std::to_string(count) +
                            " records, but received " + std::to_string(source.ref_logps.size()));
    }
    LoaderConfig config{};
    config.layout = layout_from(layout, start_token);
    config.pack = pack_config_from(shapes, batch_pairs, max_pairs, window, seed,
                                   config.layout.style == Style::kEncoderDecoder);
    config.hosts = static_cast<std::int32_t>(integer<std::int64_t>(hosts, "hosts", 1, kMaxInt32));
    config.host = static_cast<std::int32_t>(integer<std::int64_t>(host, "host", 0, config.hosts - 1));
    for (const RowShape& shape : config.pack.shapes) {
      if (shape.rows % config.hosts != 0) {
        throw py::value_error("hosts must divide the rows of every shape, but received " + std::to_string(config.hosts) +
                              " hosts and " + std::to_string(shape.rows) + " rows");
      }
    }
    config.threads = static_cast<std::int32_t>(integer<std::int64_t>(threads, "threads", 1, 256));
    config.prefetch = static_cast<std::int32_t>(integer<std::int64_t>(prefetch, "prefetch", 0, 1024));
    const auto chosen = vector<std::int32_t>(records, "records");
    shapes_ = config.pack.shapes;

    const py::gil_scoped_release release;
    std::vector<std::int32_t> kept(chosen.begin(), chosen.end());
    std::vector<Size> sizes;
    const std::size_t number = kept.empty() ? count : kept.size();
    sizes.reserve(number);
    for (std::size_t i = 0; i < number; ++i) {
      const std::int64_t record = kept.empty() ? static_cast<std::int64_t>(i) : kept[i];
      if (record < 0 || record >= static_cast<std::int64_t>(count)) {
        throw std::invalid_argument("records must be in [0, " + std::to_string(count) + "), but received " +
                                    std::to_string(record));
      }
      sizes.push_back(size_of(config.layout, source.pair(record), record));
      if (shape_of(sizes.back(), config.pack.shapes) < 0) {
        throw std::invalid_argument("the last of shapes must hold every pair, but received record " + std::to_string(record) +
                                    " with " + std::to_string(sizes.back().tokens) + " and " +
                                    std::to_string(sizes.back().prompt) + " places");
      }
    }
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

  // Epoch, batches handed over in it, batches in it, hash of its plan.
  py::tuple position() {
    Standing now{};
    {
      const py::gil_scoped_release release;
      now = loader_->standing();
    }
    return py::make_tuple(now.position.epoch, now.position.batch, now.batches, now.plan);
  }

  // Batches and rows of an epoch, decoder places in them, and how many of those hold a token.
  py::tuple measure(const py::object& epoch) {
    const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64));
    std::shared_ptr<const PairPlan> plan;
    {
      const py::gil_scoped_release release;
      plan = loader_->plan(turn);
    }
    std::int64_t places = 0, used = 0;
    {
      const py::gil_scoped_release release;
      for (const PairBatchPlan& batch : plan->batches) {
        const RowShape& shape = shapes_[static_cast<std::size_t>(batch.shape)];
        places += static_cast<std::int64_t>(shape.rows) * shape.capacity.tokens;
      }
      used = loader_->tokens(*plan);
    }
    return py::make_tuple(plan->batches.size(), plan->rows.ends.size(), places, used);
  }

  // Goes on behind `batch` batches of an epoch whose plan has the hash `saved`.
  void seek(const py::object& epoch, const py::object& batch, const py::object& saved) {
    const auto turn = integer<std::uint64_t>(epoch, "epoch", 0, static_cast<std::uint64_t>(kMaxInt64) / 2);
    const auto done = integer<std::int64_t>(batch, "batch", 0, kMaxInt64);
    const auto hash = integer<std::uint64_t>(saved, "plan", 0, std::numeric_limits<std::uint64_t>::max());
    const py::gil_scoped_release release;
    loader_->seek(turn, done, hash);
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
      throw py::type_error(std::string(name) + " must be a Column, but received " + Py_TYPE(object.ptr())->tp_name);
    }
    return object.cast<const Column&>().ragged;
  }

  py::tuple kept_;
  std::vector<RowShape> shapes_;
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
    throw py::value_error("completion_tokens must hold 1 or 2 completions of each prompt, but received " + std::to_string(group));
  }
  check_count("prompt_lengths", prompt_ends.size(), count);
  check_count("completion_tokens", static_cast<std::size_t>(sides[0]), count);
  if (length_sides[0] != sides[0] || length_sides[1] != sides[1]) {
    throw py::value_error("completion_lengths must have one entry for each of the " + std::to_string(sides[0]) + " x " +
                          std::to_string(sides[1]) + " completions, but received " + std::to_string(length_sides[0]) + " x " +
                          std::to_string(length_sides[1]));
  }
  check_count("preference", chances.size(), count);
  for (const auto& [name, sides_of] : {std::pair{"ref_logps", &logp_sides}, std::pair{"scores", &score_sides}}) {
    check_count(name, static_cast<std::size_t>((*sides_of)[0]), count);
    if ((*sides_of)[1] != 2) {
      throw py::value_error(std::string(name) + " must have two entries for each record, but received " +
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
    throw py::type_error("row_counts must be a sequence of at least one integer, but received " + describe(row_counts));
  }
  std::vector<std::int32_t> numbers;
  for (const py::handle number : py::reinterpret_borrow<py::sequence>(row_counts)) {
    numbers.push_back(static_cast<std::int32_t>(integer<std::int64_t>(number, "row_counts", 1, kMaxInt32 / 2)));
  }
  std::sort(numbers.begin(), numbers.end());
  const std::int32_t most = max_pairs_from(max_pairs, numbers.back());

  std::optional<PackedStep> packed;
  {
    const py::gil_scoped_release release;
    packed.emplace(pack_step({prompts, prompt_sides[1], prompt_ends, tokens, sides[2], ends, group, chances, logps, given,
                              wanted, names},
                             places, capacity, most, numbers));
  }
  return py::make_tuple(packed_to_numpy(std::move(packed->batch)),
                        to_numpy(std::move(packed->slots), {static_cast<py::ssize_t>(count)}));
}

}  // namespace

void define_batches(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Cancelled&) {
      PyErr_SetString(PyExc_ValueError, "a batcher must be open to hand out batches, but received a closed one. Make another.");
    }
  });
  py::class_<PairLoader>(module, "PairLoader")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&, const py::object&>(),
           py::arg("prompts"), py::arg("first"), py::arg("second"), py::arg("preference"), py::arg("ref_logps"),
           py::arg("ids"), py::kw_only(), py::arg("layout"), py::arg("decoder_start"), py::arg("shapes"),
           py::arg("batch_pairs") = 0, py::arg("max_pairs_per_row"), py::arg("window"), py::arg("seed"), py::arg("records"), py::arg("host"),
           py::arg("hosts"), py::arg("threads"), py::arg("prefetch"))
      .def("next", &PairLoader::next)
      .def("position", &PairLoader::position)
      .def("measure", &PairLoader::measure, py::arg("epoch"))
      .def("seek", &PairLoader::seek, py::arg("epoch"), py::arg("batch"), py::arg("plan"))
      .def("close", &PairLoader::close);
  module.def("pair_sizes", &py_pair_sizes, py::arg("prompts"), py::arg("first"), py::arg("second"), py::kw_only(),
             py::arg("layout"));
  module.def("plan_pairs", &py_plan_pairs, py::arg("tokens"), py::arg("prompt_tokens"), py::kw_only(),
             py::arg("shapes"), py::arg("batch_pairs") = 0, py::arg("max_pairs_per_row"), py::arg("window"), py::arg("seed"), py::arg("epoch"));
  module.def("pack_step", &py_pack_step, py::arg("prompt_tokens"), py::arg("prompt_lengths"),
             py::arg("completion_tokens"), py::arg("completion_lengths"), py::arg("preference"), py::arg("ref_logps"),
             py::arg("scores"), py::arg("where"), py::arg("ids"), py::kw_only(), py::arg("layout"), py::arg("decoder_start"),
             py::arg("row_tokens"), py::arg("prompt_row_tokens"), py::arg("max_pairs_per_row"), py::arg("row_counts"));
}

}  // namespace fastpref
