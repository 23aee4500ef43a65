// The pairs of one online step, packed by the rule of the batcher into as few rows as they need.
#pragma once

#include <cstdint>
#include <span>

#include "buffer.h"
#include "loader.h"
#include "pack.h"
#include "packed.h"

namespace fastpref {

// P prompts with `group` completions each (1 or 2), padded on the right. Records whose `where` is false are left out, and
// their other fields may be anything.
struct Step {
  std::span<const std::int32_t> prompts;  // [P, prompt_width]
  std::int64_t prompt_width;
  std::span<const std::int32_t> prompt_lengths;  // [P]
  std::span<const std::int32_t> completions;     // [P, group, completion_width]
  std::int64_t completion_width;
  std::span<const std::int32_t> completion_lengths;  // [P, group]
  std::size_t group;
  std::span<const float> preference, ref_logps, scores;  // [P], [P, 2], [P, 2]
  std::span<const bool> where;
  std::span<const std::int64_t> ids;
};

struct PackedStep {
  PackedBatch batch;
  Buffer<std::int32_t> slots;  // of each record; -1 for those left out
};

// `row_counts` grows; the first that holds all rows is the batch's. Throws std::invalid_argument, naming the record.
PackedStep pack_step(const Step& step, const Layout& layout, Size capacity, std::int32_t max_pairs,
                     std::span<const std::int32_t> row_counts);

}  // namespace fastpref
