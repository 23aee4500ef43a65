// Which pairs share a row and which rows a batch: a pure function of sizes, seed, epoch and configuration.
//
// Rows are filled (`batch_pairs` is 0), or pairs are counted.
//
// Filled: epoch e permutes all N pairs and deals them to the shapes: each to the first that holds it.
// Within a shape every `window` consecutive pairs are packed into rows by themselves. The rows of a shape are permuted and
// cut into batches, the last of which may have empty rows; then the batches of all shapes are permuted. So each epoch
// hands out each pair exactly once, and what shares a batch is not sorted by length.
//
// Counted: the permutations of epochs 0, 1, 2, ... are one endless stream, and every `batch_pairs` consecutive pairs of it
// are one batch, packed by itself into the first shape with rows enough. The batches of epoch e are those that begin in its
// part of the stream, so the last may be filled up from the next epoch. An epoch of fewer pairs than a batch may have none.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "pack.h"

namespace fastpref {

inline constexpr std::size_t kMaxRowShapes = 8;   // where rows are filled
inline constexpr std::size_t kMaxRowCounts = 64;   // where pairs are counted

// A batch of `rows` rows that hold `capacity` each. Shapes form a chain: where rows are filled, each row is at least as
// large as the one before in both streams, and not equal; where pairs are counted, all rows are alike, their numbers grow,
// and the last is at least `batch_pairs`.
struct RowShape {
  std::int32_t rows;
  Size capacity;
  bool operator==(const RowShape&) const = default;
};

struct PackConfig {
  std::vector<RowShape> shapes;  // at least one
  std::int32_t max_pairs;        // in a row, at least 1
  std::int32_t window;           // 1 to kMaxWindow; of no account where pairs are counted
  std::uint64_t seed;
  std::int32_t batch_pairs = 0;  // 0 to kMaxWindow
};

struct PairBatchPlan {
  std::int64_t first_row;
  std::int32_t rows;   // that hold pairs; those after them are empty
  std::int32_t shape;
};

struct PairPlan {
  Rows rows;
  std::vector<PairBatchPlan> batches;
  std::uint64_t hash;  // of all of the above

  std::int64_t row_begin(std::int64_t row) const { return row == 0 ? 0 : rows.ends[row - 1]; }
};

// The index of the first shape that holds a pair of that size, or -1.
std::int32_t shape_of(Size size, std::span<const RowShape> shapes);

// The batches of one epoch. There are fewer than 2^31 pairs; each has at least one decoder place and fits one of the
// shapes; `epoch` is below 2^63. Throws Cancelled soon after `cancel` is set.
PairPlan plan_pairs(std::span<const Size> sizes, const PackConfig& config, std::uint64_t epoch,
                    const std::atomic<bool>* cancel = nullptr);

}  // namespace fastpref
