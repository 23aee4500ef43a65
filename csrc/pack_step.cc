#include "pack_step.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "slab.h"

namespace fastpref {
namespace {

[[noreturn]] void refuse(const std::string& rule, const std::string& received, std::size_t record) {
  throw std::invalid_argument(rule + ", but received " + received + " at record " + std::to_string(record) +
                              ". Repair it, or leave it out with where.");
}

std::string range(std::int64_t high) { return "[1, " + std::to_string(high) + "]"; }

Pair pair_of(const Step& step, std::size_t record) {
  const std::int32_t prompt = step.prompt_lengths[record];
  if (prompt < 1 || prompt > step.prompt_width) {
    refuse("prompt_lengths must be in " + range(step.prompt_width), std::to_string(prompt), record);
  }
  Pair pair{step.prompts.subspan(record * static_cast<std::size_t>(step.prompt_width), static_cast<std::size_t>(prompt)),
            {},
            {step.ref_logps[2 * record], step.ref_logps[2 * record + 1]},
            step.preference[record],
            step.ids[record],
            {step.scores[2 * record], step.scores[2 * record + 1]}};
  for (std::size_t k = 0; k < step.group; ++k) {
    const std::size_t row = record * step.group + k;
    const std::int32_t length = step.completion_lengths[row];
    if (length < 1 || length > step.completion_width) {
      refuse("completion_lengths must be in " + range(step.completion_width), std::to_string(length), record);
    }
    pair.completions[k] =
        step.completions.subspan(row * static_cast<std::size_t>(step.completion_width), static_cast<std::size_t>(length));
  }
  for (const auto tokens : {pair.prompt, pair.completions[0], pair.completions[1]}) {
    for (const std::int32_t token : tokens) {
      if (token < 0) refuse("token ids must be in [0, 2^31)", std::to_string(token), record);
    }
  }
  if (!(pair.preference >= 0 && pair.preference <= 1)) {
    refuse("preference must be in [0, 1]", std::to_string(pair.preference), record);
  }
  return pair;
}

}  // namespace

PackedStep pack_step(const Step& step, const Layout& layout, Size capacity, std::int32_t max_pairs,
                     std::span<const std::int32_t> row_counts) {
  const std::size_t count = step.ids.size();
  std::vector<Pair> pairs(count);
  std::vector<Size> sizes(count);
  std::vector<std::int32_t> kept;
  for (std::size_t i = 0; i < count; ++i) {
    if (!step.where[i]) continue;
    pairs[i] = pair_of(step, i);
    sizes[i] = size_of(layout, pairs[i].prompt.size(), pairs[i].completions[0].size(), pairs[i].completions[1].size());
    if (!fits(sizes[i], capacity)) {
      refuse("row_tokens and prompt_row_tokens must hold every pair whole",
             std::to_string(capacity.tokens) + " and " + std::to_string(capacity.prompt) + " and a pair of " +
                 std::to_string(sizes[i].tokens) + " and " + std::to_string(sizes[i].prompt) + " places",
             i);
    }
    kept.push_back(static_cast<std::int32_t>(i));
  }
  Rows rows;
  Packer packer(capacity, max_pairs);
  for (std::size_t at = 0; at < kept.size(); at += kMaxWindow) {
    packer.pack(std::span(kept).subspan(at, std::min<std::size_t>(kMaxWindow, kept.size() - at)), sizes, rows);
  }
  const auto number =
      std::lower_bound(row_counts.begin(), row_counts.end(), static_cast<std::int64_t>(rows.ends.size()));
  if (number == row_counts.end()) {
    throw std::invalid_argument("row_counts must reach the rows that are needed, but received at most " +
                                std::to_string(row_counts.back()) + " for " + std::to_string(rows.ends.size()) +
                                " rows of pairs. Leave counts out.");
  }
  const PackedShape shape{*number, capacity.tokens, capacity.prompt, max_pairs};
  PackedStep packed{
      {shape, std::make_unique<Lease>(std::make_shared<SlabPool>(0, false), offsets_of(shape).bytes)},
      Buffer<std::int32_t>(count)};
  std::fill_n(packed.slots.data(), count, -1);
  PackedWriter writer(layout, shape, 0, packed.batch.memory->data());
  std::vector<Pair> row_pairs;
  for (std::int32_t row = 0; row < shape.rows; ++row) {
    row_pairs.clear();
    if (static_cast<std::size_t>(row) < rows.ends.size()) {
      for (std::int64_t at = row == 0 ? 0 : rows.ends[row - 1]; at < rows.ends[row]; ++at) {
        packed.slots[rows.pairs[at]] = row * max_pairs + static_cast<std::int32_t>(row_pairs.size());
        row_pairs.push_back(pairs[rows.pairs[at]]);
      }
    }
    writer.write(row_pairs);
  }
  return packed;
}

}  // namespace fastpref
