// Any sizes, shapes, window, seed and epoch: each pair lies in one row once, rows hold what they can, batches hold rows.
#include <vector>

#include "input.h"
#include "pair_plan.h"

namespace {

using fastpref::PairPlan;
using fastpref::RowShape;
using fastpref::Size;

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
      std::int64_t tokens = 0, prompt = 0;
      HOLDS(plan.row_begin(row) < plan.rows.ends[row]);
      HOLDS(plan.rows.ends[row] - plan.row_begin(row) <= config.max_pairs);
      for (std::int64_t at = plan.row_begin(row); at < plan.rows.ends[row]; ++at) {
        const std::int32_t pair = plan.rows.pairs[static_cast<std::size_t>(at)];
        ++seen.at(static_cast<std::size_t>(pair));
        HOLDS(shape_of(sizes[pair], shapes) == batch.shape);
        tokens += sizes[pair].tokens;
        prompt += sizes[pair].prompt;
      }
      HOLDS(tokens <= shape.capacity.tokens && prompt <= shape.capacity.prompt);
    }
  }
  for (const int count : seen) HOLDS(count == 1);
  for (const int count : used) HOLDS(count == 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  plan_of_pairs(input);
  return 0;
}
