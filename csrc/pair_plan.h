// Which pairs share a row and which rows a batch: a pure function of sizes, seed, epoch and configuration.
//
// Order. Epoch e permutes all N pairs and deals them to the shapes: each to the first that holds it.
// Within a shape every `window` consecutive pairs are packed into rows by themselves. The rows of a shape are permuted and
// cut into batches, the last of which may have empty rows; then the batches of all shapes are permuted. So each epoch
// hands out each pair exactly once, and what shares a batch is not sorted by length.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "pack.h"

namespace fastpref {

inline constexpr std::size_t kMaxRowShapes = 8;

// A batch of `rows` rows that hold `capacity` each. Shapes form a chain: each row is at least as large as the one before
// in both streams, and not equal.
struct RowShape {
  std::int32_t rows;
  Size capacity;
  bool operator==(const RowShape&) const = default;
};

struct PackConfig {
  std::vector<RowShape> shapes;  // 1 to kMaxRowShapes
  std::int32_t max_pairs;        // in a row, at least 1
  std::int32_t window;           // 1 to kMaxWindow
  std::uint64_t seed;
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
// shapes. Throws Cancelled soon after `cancel` is set.
PairPlan plan_pairs(std::span<const Size> sizes, const PackConfig& config, std::uint64_t epoch,
                    const std::atomic<bool>* cancel = nullptr);

}  // namespace fastpref
