// Any step of an online run: refused with the record named, or each pair that counts lies in one slot of its own, whole.
#include <stdexcept>
#include <string>
#include <vector>

#include "input.h"
#include "pack_step.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fastpref;
  Input input(data, size);
  const Layout layout{static_cast<Style>(input.in(0, 2, 1)), 1};
  const bool encoder = layout.style == Style::kEncoderDecoder;
  const auto count = static_cast<std::size_t>(input.in(0, 12, 1)), group = static_cast<std::size_t>(input.in(1, 2, 1));
  const std::int64_t prompt_width = input.in(1, 9, 1), completion_width = input.in(1, 9, 1);
  const Size capacity{static_cast<std::int32_t>(input.in(1, 40, 1)),
                      encoder ? static_cast<std::int32_t>(input.in(1, 12, 1)) : 0};
  const auto most = static_cast<std::int32_t>(input.in(1, 4, 1));
  std::vector<std::int32_t> rows{static_cast<std::int32_t>(input.in(1, 12, 1))};
  rows.push_back(rows.back() + static_cast<std::int32_t>(input.in(1, 12, 1)));

  // One place in 64 breaks the rule of its field.
  const auto mostly = [&](std::int64_t low, std::int64_t high) {
    return static_cast<std::int32_t>(input.in(0, 63, 1) == 0 ? high + 1 : input.in(low, high, 1));
  };
  std::vector<std::int32_t> prompts, prompt_lengths, completions, lengths;
  std::vector<float> preference, pairs(2 * count, 0.5F);
  std::vector<std::int64_t> ids;
  const auto where = std::make_unique<bool[]>(count + 1);
  for (std::size_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<std::int64_t>(i));
    where[i] = input.in(0, 4, 1) != 0;
    prompt_lengths.push_back(mostly(1, prompt_width));
    preference.push_back(static_cast<float>(mostly(0, 4)) / 4.0F);
    for (std::size_t k = 0; k < group; ++k) lengths.push_back(mostly(1, completion_width));
  }
  prompts.assign(count * static_cast<std::size_t>(prompt_width), input.in(0, 63, 1) == 0 ? -1 : 3);
  completions.assign(count * group * static_cast<std::size_t>(completion_width), 5);
  const Step step{prompts, prompt_width, prompt_lengths, completions, completion_width, lengths, group,
                  preference, pairs, pairs, {where.get(), count}, ids};
  try {
    const PackedStep packed = pack_step(step, layout, capacity, most, rows);
    HOLDS(packed.batch.shape.rows == rows[0] || packed.batch.shape.rows == rows[1]);
    std::vector<bool> taken(packed.batch.shape.slots(), false);
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t slot = packed.slots.data()[i];
      HOLDS((slot >= 0) == where[i]);
      if (slot < 0) continue;
      HOLDS(!taken[static_cast<std::size_t>(slot)]);
      taken[static_cast<std::size_t>(slot)] = true;
    }
    const PackedOffsets offsets = offsets_of(packed.batch.shape);
    const auto* const written = reinterpret_cast<const std::int64_t*>(packed.batch.memory->data() + offsets.at[kIds]);
    for (std::size_t i = 0; i < count; ++i) {
      if (where[i]) HOLDS(written[packed.slots.data()[i]] == static_cast<std::int64_t>(i));
    }
  } catch (const std::invalid_argument& error) {
    HOLDS(std::string(error.what()).find("but received") != std::string::npos);
  }
  return 0;
}
