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

// The pairs of the batches of an epoch, one after another: a whole number of batches.
std::vector<std::int32_t> stream_of(std::int64_t count, const PackConfig& config, std::uint64_t epoch,
                                    const std::atomic<bool>* cancel) {
  const auto batch = static_cast<std::uint64_t>(config.batch_pairs);
  // Pairs that the batches before epoch `turn` take of it and of those after it: -turn * count, modulo the batch.
  const auto ahead = [&](std::uint64_t turn) {
    return static_cast<std::int64_t>((batch - turn % batch * (static_cast<std::uint64_t>(count) % batch) % batch) % batch);
  };
  const std::int64_t end = count + ahead(epoch + 1);
  std::vector<std::int32_t> stream;
  for (std::int64_t at = ahead(epoch); at < end;) {
    const std::int64_t turn = at / count, begin = turn * count;
    const std::int64_t stop = std::min(count, end - begin);
    const auto order = permutation_head(static_cast<std::int32_t>(count), static_cast<std::int32_t>(stop),
                                        Random(config.seed, epoch + static_cast<std::uint64_t>(turn), kRecords), cancel);
    stream.insert(stream.end(), order.begin() + (at - begin), order.end());
    at = begin + stop;
  }
  return stream;
}

void count_pairs(std::span<const Size> sizes, const PackConfig& config, std::uint64_t epoch, PairPlan& plan,
                 const std::atomic<bool>* cancel) {
  const auto stream = stream_of(static_cast<std::int64_t>(sizes.size()), config, epoch, cancel);
  const auto batch = static_cast<std::size_t>(config.batch_pairs);
  Packer packer(config.shapes.back().capacity, config.max_pairs);
  plan.rows.pairs.reserve(stream.size());
  for (std::size_t at = 0; at < stream.size(); at += batch) {
    check(cancel);
    const auto first = static_cast<std::int64_t>(plan.rows.ends.size());
    packer.pack(std::span(stream).subspan(at, batch), sizes, plan.rows);
    const auto rows = static_cast<std::int32_t>(static_cast<std::int64_t>(plan.rows.ends.size()) - first);
    const auto shape = std::partition_point(config.shapes.begin(), config.shapes.end(),
                                            [&](const RowShape& one) { return one.rows < rows; });
    plan.batches.push_back({first, rows, static_cast<std::int32_t>(shape - config.shapes.begin())});
  }
}

void fill_rows(std::span<const Size> sizes, const PackConfig& config, std::uint64_t epoch, PairPlan& plan,
               const std::atomic<bool>* cancel) {
  const auto count = static_cast<std::int32_t>(sizes.size());
  const auto order = permutation_head(count, count, Random(config.seed, epoch, kRecords), cancel);
  std::vector<std::vector<std::int32_t>> parts(config.shapes.size());
  if (parts.size() > 1) {
    for (const std::int32_t pair : order) parts[shape_of(sizes[pair], config.shapes)].push_back(pair);
  }

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
  PairPlan plan{};
  (config.batch_pairs > 0 ? count_pairs : fill_rows)(sizes, config, epoch, plan, cancel);
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
