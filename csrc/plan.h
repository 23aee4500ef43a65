// Which records share a batch, and in which shape: a pure function of lengths, seed, epoch and configuration.
//
// Shapes form a chain: each is at least as large as the one before on both sides. A record belongs to the first shape
// that holds it, so whatever does not fill a batch of one shape fits into the next.
//
// Order. Epoch e permutes all N records; the permutations of epochs 0, 1, 2, ... one after another are one endless
// stream, and batch g holds B consecutive places of it, up to the sorting below. Epoch e plans the batches
// [ceil(eN/B), ceil((e+1)N/B)): its last batch is filled up from the head of the next permutation. So every batch is
// full, every record is handed out once an epoch, and batch g belongs to epoch floor(gB/N).
//
// Within an epoch the records are sorted by shape (stably), cut into batches, and the batches permuted.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "buffer.h"

namespace fastpref {

// Bumped whenever the same arguments would give another plan: a saved state of the old order is then refused.
inline constexpr std::uint32_t kPlanVersion = 1;

struct Shape {
  std::int32_t prompt;
  std::int32_t completion;  // 0 where records are prompts alone
  bool operator==(const Shape&) const = default;
};

// At most `max_shapes` shapes with the fewest padded tokens, `prompt + completions * completion` to a record.
//
// The last shape holds the longest record. Sides are lengths rounded up to `multiple`, then capped at `limit`; where a
// side has more than 32 of them, the 32-quantiles are tried. Exact over that grid; the fewest shapes win a tie.
// `completion_lengths` is the longest completion of each record (empty when `completions` is 0).
std::vector<Shape> choose_shapes(std::span<const std::int32_t> prompt_lengths,
                                 std::span<const std::int32_t> completion_lengths, std::int64_t completions,
                                 std::size_t max_shapes, std::int32_t multiple, Shape limit);

// The first shape of the chain that holds each record. Throws std::invalid_argument where none does.
Buffer<std::int32_t> assign_shapes(std::span<const std::int32_t> prompt_lengths,
                                   std::span<const std::int32_t> completion_lengths, std::span<const Shape> shapes);

struct Plan {
  Buffer<std::int64_t> rows;    // batch after batch, `batch_size` records each
  Buffer<std::int32_t> shapes;  // of each batch
};

// The batches of one epoch; none when there are fewer records than a batch and an earlier epoch already used these.
// `shape_of` holds indices below `num_shapes`. Throws std::invalid_argument where a place in the stream passes 2^62.
Plan plan_epoch(std::span<const std::int32_t> shape_of, std::int32_t num_shapes, std::int64_t batch_size,
                std::uint64_t seed, std::uint64_t epoch);

}  // namespace fastpref
