// Any values and offsets: refused, or packed into exactly the memory that is asked for, each token where it belongs.
#include <memory>
#include <optional>
#include <vector>

#include "ragged.h"
#include "buffer.h"
#include "input.h"
#include "pack.h"
#include "packed.h"

namespace {

using fastpref::Pair;
using fastpref::Ragged;
using fastpref::Size;

std::optional<Ragged> column(Input& input, const std::vector<std::int32_t>& values, std::size_t rows) {
  // Mostly good offsets, now and then any.
  const bool wild = input.in(0, 15, 1) == 0;
  std::vector<std::int64_t> offsets{wild ? static_cast<std::int64_t>(input.number(8)) : 0};
  for (std::size_t i = 0; i < rows; ++i) {
    offsets.push_back(wild ? static_cast<std::int64_t>(input.number(8)) : offsets.back() + input.in(0, 12, 1));
  }
  try {
    return Ragged(values, offsets, input.in(0, 7, 1) == 0 ? 100 : std::int64_t{1} << 31);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

void check_field(const std::int32_t* field, std::int64_t places, std::int32_t low, std::int32_t high) {
  for (std::int64_t i = 0; i < places; ++i) HOLDS(field[i] >= low && field[i] <= high);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const fastpref::Layout layout{static_cast<fastpref::Style>(input.in(0, 2, 1)), 7};
  const bool encoder = layout.style == fastpref::Style::kEncoderDecoder;
  const Size capacity{static_cast<std::int32_t>(input.in(1, 200)), encoder ? static_cast<std::int32_t>(input.in(1, 90)) : 0};
  const auto most = static_cast<std::int32_t>(input.in(1, 6, 1));
  const auto count = static_cast<std::size_t>(input.in(0, 40, 1));
  const bool single = input.in(0, 3, 1) == 0;
  std::vector<std::int32_t> values(static_cast<std::size_t>(input.in(0, 500)));
  for (std::int32_t& value : values) value = static_cast<std::int32_t>(input.number(input.in(0, 30, 1) == 0 ? 4 : 1));
  const auto prompts = column(input, values, count), first = column(input, values, count), second = column(input, values, count);
  if (!prompts || !first || !second) return 0;

  std::vector<Pair> pairs;
  std::vector<Size> sizes;
  std::vector<std::int32_t> kept;
  for (std::size_t i = 0; i < count; ++i) {
    const auto row = static_cast<std::int64_t>(i);
    Pair pair{prompts->row(row), {first->row(row), single ? std::span<const std::int32_t>() : second->row(row)}, {-1, -2}, 0.5F, row};
    pairs.push_back(pair);
    sizes.push_back({0, 0});
    if (pair.prompt.empty() || pair.completions[0].empty()) continue;
    sizes.back() = size_of(layout, pair.prompt.size(), pair.completions[0].size(), pair.completions[1].size());
    if (fits(sizes.back(), capacity)) kept.push_back(static_cast<std::int32_t>(i));
  }
  fastpref::Rows rows;
  fastpref::Packer packer(capacity, most);
  const std::size_t half = kept.size() / 2;
  packer.pack(std::span(kept).first(half), sizes, rows);
  packer.pack(std::span(kept).subspan(half), sizes, rows);

  const auto number = static_cast<std::int32_t>(rows.ends.size() + 1);
  const fastpref::PackedShape shape{number, capacity.tokens, capacity.prompt, most};
  const fastpref::PackedOffsets offsets = offsets_of(shape);
  // Exactly the bytes: one more would be found by the address sanitizer.
  const std::unique_ptr<std::byte[], fastpref::Free> memory(
      static_cast<std::byte*>(std::aligned_alloc(fastpref::kAlignment, offsets.bytes)));
  HOLDS(offsets.bytes % fastpref::kAlignment == 0);
  fastpref::PackedWriter writer(layout, shape, 3, memory.get());
  std::vector<Pair> members;
  std::int64_t real = 0, scored = 0;
  for (std::int32_t row = 0; row < number; ++row) {
    members.clear();
    if (row + 1 < number) {
      for (std::int64_t at = row == 0 ? 0 : rows.ends[row - 1]; at < rows.ends[row]; ++at) {
        members.push_back(pairs[rows.pairs[at]]);
        real += sizes[rows.pairs[at]].tokens;
        scored += static_cast<std::int64_t>(members.back().completions[0].size() + members.back().completions[1].size());
      }
      HOLDS(!members.empty() && members.size() <= static_cast<std::size_t>(most));
    }
    writer.write(members);
  }
  const auto field = [&](fastpref::Field name) {
    return reinterpret_cast<const std::int32_t*>(memory.get() + offsets.at[name]);
  };
  const std::int64_t places = std::int64_t{number} * capacity.tokens;
  check_field(field(fastpref::kPositions), places, 0, capacity.tokens);
  check_field(field(fastpref::kPairs), places, -1, most - 1);
  check_field(field(fastpref::kStreams), places, 0, 2);
  check_field(field(fastpref::kSequences), places, -1, 2 * (number + 3) * most);
  // By segment: how many of its targets came by so far.
  std::vector<std::size_t> said(static_cast<std::size_t>(2 * (number + 3) * most), 0);
  for (std::int64_t i = 0; i < places; ++i) {
    const std::int32_t segment = field(fastpref::kSequences)[i];
    real -= field(fastpref::kPairs)[i] >= 0;
    if (segment < 0) {
      HOLDS(field(fastpref::kTargets)[i] == 0);
      continue;
    }
    --scored;
    // Row 0 of this host is row 3 of the batch.
    const std::int32_t slot = segment / 2 - 3 * most;
    HOLDS(slot / most == i / capacity.tokens && slot % most == field(fastpref::kPairs)[i]);
    const std::int64_t row = slot / most;
    const Pair& pair = pairs[rows.pairs[static_cast<std::size_t>((row == 0 ? 0 : rows.ends[row - 1]) + slot % most)]];
    const auto completion = pair.completions[static_cast<std::size_t>(segment % 2)];
    const std::size_t at = said[static_cast<std::size_t>(segment)]++;
    const std::int32_t before = at > 0 ? completion[at - 1] : encoder ? layout.start_token : pair.prompt.back();
    HOLDS(at < completion.size() && field(fastpref::kTargets)[i] == completion[at]);
    HOLDS(field(fastpref::kTokens)[i] == before && field(fastpref::kStreams)[i] == 1 + segment % 2);
    HOLDS(field(fastpref::kPositions)[i] == static_cast<std::int32_t>(at + (encoder ? 0 : pair.prompt.size() - 1)));
  }
  HOLDS(real == 0 && scored == 0);
  return 0;
}
