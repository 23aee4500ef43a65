#include "plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "random.h"

namespace fastpref {
namespace {

constexpr std::size_t kSideCandidates = 32;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// Sorted distinct side lengths worth trying; the last holds every length.
std::vector<std::int32_t> side_candidates(std::span<const std::int32_t> lengths, std::int32_t multiple,
                                          std::int32_t limit) {
  std::vector<std::int32_t> sides(lengths.begin(), lengths.end());
  for (std::int32_t& side : sides) {
    side = static_cast<std::int32_t>(std::min<std::int64_t>(ceil_div(side, multiple) * multiple, limit));
  }
  std::sort(sides.begin(), sides.end());
  std::vector<std::int32_t> distinct(sides);
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  if (distinct.size() <= kSideCandidates) return distinct;
  std::vector<std::int32_t> quantiles;
  for (std::size_t i = 1; i <= kSideCandidates; ++i) {
    quantiles.push_back(sides[ceil_div(static_cast<std::int64_t>(sides.size() * i), kSideCandidates) - 1]);
  }
  quantiles.erase(std::unique(quantiles.begin(), quantiles.end()), quantiles.end());
  return quantiles;
}

std::size_t side_index(const std::vector<std::int32_t>& sides, std::int32_t length) {
  return static_cast<std::size_t>(std::lower_bound(sides.begin(), sides.end(), length) - sides.begin());
}

}  // namespace

std::vector<Shape> choose_shapes(std::span<const std::int32_t> prompt_lengths,
                                 std::span<const std::int32_t> completion_lengths, std::int64_t completions,
                                 std::size_t max_shapes, std::int32_t multiple, Shape limit) {
  const std::vector<std::int32_t> rows = side_candidates(prompt_lengths, multiple, limit.prompt);
  const std::vector<std::int32_t> columns =
      completions == 0 ? std::vector<std::int32_t>{0}
                       : side_candidates(completion_lengths, multiple, limit.completion);
  const std::size_t width = columns.size();
  const std::size_t count = rows.size() * width;

  // held[i * width + j]: records that fit into rows[i] x columns[j].
  std::vector<std::int64_t> held(count, 0);
  for (std::size_t record = 0; record < prompt_lengths.size(); ++record) {
    const std::size_t j = completions == 0 ? 0 : side_index(columns, completion_lengths[record]);
    ++held[side_index(rows, prompt_lengths[record]) * width + j];
  }
  for (std::size_t at = 0; at < count; ++at) held[at] += at % width ? held[at - 1] : 0;
  for (std::size_t at = width; at < count; ++at) held[at] += held[at - width];

  const auto cost = [&](std::size_t at) { return rows[at / width] + completions * columns[at % width]; };
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int64_t> best(count);
  for (std::size_t at = 0; at < count; ++at) best[at] = held[at] * cost(at);
  // before[k][at]: the shape before `at` in the best chain of k + 2 shapes that ends there.
  std::vector<std::vector<std::size_t>> before;
  std::int64_t fewest = best[count - 1];
  std::size_t links = 0;
  for (std::size_t k = 1; k < max_shapes; ++k) {
    std::vector<std::int64_t> next(count, kNone);
    std::vector<std::size_t> from(count, 0);
    for (std::size_t at = 0; at < count; ++at) {
      for (std::size_t i = 0; i <= at / width; ++i) {
        for (std::size_t j = 0; j <= at % width; ++j) {
          const std::size_t smaller = i * width + j;
          if (smaller == at || best[smaller] == kNone) continue;
          const std::int64_t total = best[smaller] + (held[at] - held[smaller]) * cost(at);
          if (total < next[at]) next[at] = total, from[at] = smaller;
        }
      }
    }
    best = std::move(next);
    before.push_back(std::move(from));
    if (best[count - 1] < fewest) fewest = best[count - 1], links = k;
  }

  std::vector<Shape> shapes;
  std::size_t at = count - 1;
  for (std::size_t k = links; ; --k) {
    shapes.push_back({rows[at / width], columns[at % width]});
    if (k == 0) break;
    at = before[k - 1][at];
  }
  std::reverse(shapes.begin(), shapes.end());
  return shapes;
}

Buffer<std::int32_t> assign_shapes(std::span<const std::int32_t> prompt_lengths,
                                   std::span<const std::int32_t> completion_lengths, std::span<const Shape> shapes) {
  Buffer<std::int32_t> assigned(prompt_lengths.size());
  for (std::size_t record = 0; record < prompt_lengths.size(); ++record) {
    const std::int32_t prompt = prompt_lengths[record];
    const std::int32_t completion = completion_lengths.empty() ? 0 : completion_lengths[record];
    // The chain is monotone, so "holds the record" flips once along it.
    const auto shape = std::partition_point(shapes.begin(), shapes.end(), [&](const Shape& candidate) {
      return candidate.prompt < prompt || candidate.completion < completion;
    });
    if (shape == shapes.end()) {
      throw std::invalid_argument("the last of shapes must hold every record, got (" +
                                  std::to_string(shapes.back().prompt) + ", " +
                                  std::to_string(shapes.back().completion) + ") and record " + std::to_string(record) +
                                  " with " + std::to_string(prompt) + " prompt and " + std::to_string(completion) +
                                  " completion tokens");
    }
    assigned[record] = static_cast<std::int32_t>(shape - shapes.begin());
  }
  return assigned;
}

Plan plan_epoch(std::span<const std::int32_t> shape_of, std::int32_t num_shapes, std::int64_t batch_size,
                std::uint64_t seed, std::uint64_t epoch) {
  const auto records = static_cast<std::int64_t>(shape_of.size());
  constexpr std::uint64_t kLimit = std::uint64_t{1} << 62;
  if (epoch >= kLimit / static_cast<std::uint64_t>(records) - 1) {
    throw std::invalid_argument("epoch * records must stay below 2^62, got epoch " + std::to_string(epoch) + " of " +
                                std::to_string(records) + " records");
  }
  const auto start = static_cast<std::int64_t>(epoch) * records;
  const std::int64_t first = ceil_div(start, batch_size) * batch_size;
  const std::int64_t last = ceil_div(start + records, batch_size) * batch_size;
  const auto places = static_cast<std::size_t>(last - first);
  const std::size_t batches = places / static_cast<std::size_t>(batch_size);

  std::vector<std::int64_t> stream;
  stream.reserve(places);
  for (std::int64_t turn = first / records; turn * records < last; ++turn) {
    const std::int64_t from = std::max(first - turn * records, std::int64_t{0});
    const std::int64_t to = std::min(last - turn * records, records);
    const auto order = permutation_head(records, to, Random(seed, static_cast<std::uint64_t>(turn), kRecords));
    stream.insert(stream.end(), order.begin() + from, order.end());
  }

  std::vector<std::size_t> begin(static_cast<std::size_t>(num_shapes) + 1, 0);
  for (const std::int64_t row : stream) ++begin[shape_of[row] + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<std::int64_t> sorted(places);
  for (const std::int64_t row : stream) sorted[begin[shape_of[row]]++] = row;

  Plan plan{Buffer<std::int64_t>(places), Buffer<std::int32_t>(batches)};
  const auto count = static_cast<std::int64_t>(batches);
  const auto order = permutation_head(count, count, Random(seed, epoch, kBatches));
  for (std::size_t to = 0; to < batches; ++to) {
    const auto batch = sorted.begin() + order[to] * batch_size;
    std::copy_n(batch, batch_size, plan.rows.data() + static_cast<std::int64_t>(to) * batch_size);
    plan.shapes[to] = shape_of[*(batch + batch_size - 1)];
  }
  return plan;
}

}  // namespace fastpref
