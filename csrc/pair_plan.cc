#include "pair_plan.h"

#include <algorithm>
#include <utility>

#include "random.h"

namespace fastpref {
namespace {

class Hash {
 public:
  void add(std::int64_t value) {
    value_ = (value_ ^ static_cast<std::uint64_t>(value)) * 0xBF58476D1CE4E5B9;
    value_ ^= value_ >> 32;
  }
  std::uint64_t value() const { return mix(value_); }

 private:
  std::uint64_t value_ = kGolden;
};

void append_rows(const Rows& packed, std::span<const std::int32_t> order, Rows& rows) {
  for (const std::int32_t row : order) {
    const std::int64_t begin = row == 0 ? 0 : packed.ends[row - 1];
    rows.pairs.insert(rows.pairs.end(), packed.pairs.begin() + begin, packed.pairs.begin() + packed.ends[row]);
    rows.ends.push_back(static_cast<std::int64_t>(rows.pairs.size()));
  }
}

}  // namespace

std::int32_t shape_of(Size size, std::span<const RowShape> shapes) {
  // The chain is monotone, so "holds the pair" flips once along it.
  const auto shape =
      std::partition_point(shapes.begin(), shapes.end(), [&](const RowShape& one) { return !fits(size, one.capacity); });
  return shape == shapes.end() ? -1 : static_cast<std::int32_t>(shape - shapes.begin());
}

PairPlan plan_pairs(std::span<const Size> sizes, const PackConfig& config, std::uint64_t epoch,
                    const std::atomic<bool>* cancel) {
  const auto count = static_cast<std::int32_t>(sizes.size());
  const auto order = permutation_head(count, count, Random(config.seed, epoch, kRecords), cancel);
  std::vector<std::vector<std::int32_t>> parts(config.shapes.size());
  if (parts.size() > 1) {
    for (const std::int32_t pair : order) parts[shape_of(sizes[pair], config.shapes)].push_back(pair);
  }

  PairPlan plan{};
  plan.rows.pairs.reserve(sizes.size());
  std::vector<PairBatchPlan> batches;
  for (std::size_t shape = 0; shape < config.shapes.size(); ++shape) {
    const std::span<const std::int32_t> part = parts.size() > 1 ? std::span(parts[shape]) : std::span(order);
    Packer packer(config.shapes[shape].capacity, config.max_pairs);
    Rows packed;
    packed.pairs.reserve(part.size());
    for (std::size_t at = 0; at < part.size(); at += static_cast<std::size_t>(config.window)) {
      check(cancel);
      packer.pack(part.subspan(at, std::min<std::size_t>(config.window, part.size() - at)), sizes, packed);
    }
    const auto rows = static_cast<std::int32_t>(packed.ends.size());
    const auto first = static_cast<std::int64_t>(plan.rows.ends.size());
    append_rows(packed, permutation_head(rows, rows, Random(config.seed, epoch, kRows + shape), cancel), plan.rows);
    for (std::int32_t row = 0; row < rows; row += config.shapes[shape].rows) {
      batches.push_back({first + row, std::min(config.shapes[shape].rows, rows - row), static_cast<std::int32_t>(shape)});
      if (config.shapes[shape].rows > rows - row) break;  // the next row number might pass 2^31
    }
  }

  const auto number = static_cast<std::int64_t>(batches.size());
  for (const std::int64_t batch : permutation_head(number, number, Random(config.seed, epoch, kBatches), cancel)) {
    plan.batches.push_back(batches[batch]);
  }
  Hash hash;
  for (const std::int32_t pair : plan.rows.pairs) hash.add(pair);
  for (const std::int64_t end : plan.rows.ends) hash.add(end);
  for (const PairBatchPlan& batch : plan.batches) {
    hash.add(batch.first_row);
    hash.add(batch.rows);
    hash.add(batch.shape);
  }
  plan.hash = hash.value();
  return plan;
}

}  // namespace fastpref
