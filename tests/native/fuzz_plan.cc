// Any sizes, shapes, window, seed and epoch: each pair lies in one row once, rows hold what they can, batches hold rows; or
// each batch holds its number of pairs, in the smallest shape with rows enough.
#include <vector>

#include "input.h"
#include "pair_plan.h"

namespace {

using fastpref::PairPlan;
using fastpref::RowShape;
using fastpref::Size;

void check_row(const PairPlan& plan, std::int64_t row, const std::vector<Size>& sizes, Size capacity, std::int32_t most) {
  std::int64_t tokens = 0, prompt = 0;
  HOLDS(plan.row_begin(row) < plan.rows.ends[row]);
  HOLDS(plan.rows.ends[row] - plan.row_begin(row) <= most);
  for (std::int64_t at = plan.row_begin(row); at < plan.rows.ends[row]; ++at) {
    const Size& size = sizes.at(static_cast<std::size_t>(plan.rows.pairs[static_cast<std::size_t>(at)]));
    tokens += size.tokens;
    prompt += size.prompt;
  }
  HOLDS(tokens <= capacity.tokens && prompt <= capacity.prompt);
}

void counted(const std::vector<Size>& sizes, fastpref::PackConfig config, std::uint64_t epoch) {
  if (sizes.empty()) return;
  const Size capacity = config.shapes.back().capacity;
  const auto batch = static_cast<std::int32_t>(1 + config.seed % 60);
  config.batch_pairs = batch;
  config.shapes = {{batch + 2, capacity}};
  if (batch > 3) config.shapes.insert(config.shapes.begin(), {batch / 3, capacity});
  std::vector<std::int64_t> seen(sizes.size(), 0);
  std::int64_t handed = 0;
  // From epoch 0 on, what was handed out is known; from any other, only what a batch is.
  for (const std::uint64_t from : {std::uint64_t{0}, std::uint64_t{1}, epoch}) {
    const PairPlan plan = plan_pairs(sizes, config, from);
    std::int64_t row = 0;
    for (const fastpref::PairBatchPlan& one : plan.batches) {
      HOLDS(one.first_row == row && one.rows >= 1);
      const RowShape& shape = config.shapes.at(static_cast<std::size_t>(one.shape));
      HOLDS(one.rows <= shape.rows && (one.shape == 0 || one.rows > config.shapes[0].rows));
      HOLDS(plan.rows.ends.at(static_cast<std::size_t>(row + one.rows - 1)) - plan.row_begin(row) == batch);
      for (std::int32_t i = 0; i < one.rows; ++i) check_row(plan, row++, sizes, capacity, config.max_pairs);
    }
    HOLDS(row == static_cast<std::int64_t>(plan.rows.ends.size()));
    if (from > 1) break;
    for (const std::int32_t pair : plan.rows.pairs) ++seen[static_cast<std::size_t>(pair)];
    handed += static_cast<std::int64_t>(plan.rows.pairs.size());
    const auto passes = static_cast<std::int64_t>(from + 1);
    HOLDS(handed >= passes * static_cast<std::int64_t>(sizes.size()));
    HOLDS(handed < passes * static_cast<std::int64_t>(sizes.size()) + batch);
    for (const std::int64_t count : seen) HOLDS(count >= passes);
    if (epoch <= 1 && from == 1) break;
  }
}

void plan_of_pairs(Input& input) {
  const bool encoder = input.in(0, 1, 1) == 1;
  std::vector<RowShape> shapes;
  Size capacity{0, 0};
  for (std::int64_t i = input.in(1, 3, 1); i > 0; --i) {
    // Wide rows cost time and are seldom needed: as many of each power of two.
    const std::int64_t widest = std::int64_t{1} << input.in(0, 15, 1);
    capacity.tokens += static_cast<std::int32_t>(input.in(1, widest, 2));
    if (encoder) capacity.prompt += static_cast<std::int32_t>(input.in(1, widest, 2));
    shapes.push_back({static_cast<std::int32_t>(input.in(1, 9, 1)), capacity});
  }
  const fastpref::PackConfig config{shapes, static_cast<std::int32_t>(input.in(1, 40, 1)),
                                    static_cast<std::int32_t>(input.in(1, fastpref::kMaxWindow, 2)), input.number(8)};
  const std::uint64_t epoch = input.number(8);
  std::vector<Size> sizes;
  while (input.left() > 0) {
    sizes.push_back({static_cast<std::int32_t>(input.in(1, capacity.tokens)),
                     encoder ? static_cast<std::int32_t>(input.in(1, capacity.prompt)) : 0});
  }
  const PairPlan plan = plan_pairs(sizes, config, epoch);
  HOLDS(plan_pairs(sizes, config, epoch).hash == plan.hash);

  std::vector<int> seen(sizes.size(), 0);
  std::vector<int> used(plan.rows.ends.size(), 0);
  HOLDS(plan.rows.pairs.size() == sizes.size());
  HOLDS(plan.rows.ends.empty() || plan.rows.ends.back() == static_cast<std::int64_t>(sizes.size()));
  for (const fastpref::PairBatchPlan& batch : plan.batches) {
    const RowShape& shape = shapes.at(static_cast<std::size_t>(batch.shape));
    HOLDS(batch.rows >= 1 && batch.rows <= shape.rows);
    for (std::int64_t row = batch.first_row; row < batch.first_row + batch.rows; ++row) {
      ++used.at(static_cast<std::size_t>(row));
      check_row(plan, row, sizes, shape.capacity, config.max_pairs);
      for (std::int64_t at = plan.row_begin(row); at < plan.rows.ends[row]; ++at) {
        const std::int32_t pair = plan.rows.pairs[static_cast<std::size_t>(at)];
        ++seen.at(static_cast<std::size_t>(pair));
        HOLDS(shape_of(sizes[pair], shapes) == batch.shape);
      }
    }
  }
  for (const int count : seen) HOLDS(count == 1);
  for (const int count : used) HOLDS(count == 1);
  counted(sizes, config, epoch / 2);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  plan_of_pairs(input);
  return 0;
}
