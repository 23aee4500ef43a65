// Best and worst of K completions of each prompt, by a knockout tournament (INPO, section 4.1).
//
// Round one pairs all K. Winners then meet winners while losers meet losers, until one of each is left, and these two
// meet last: only where the best wins do they teach. With K = 8 that is 4 + (2 + 2) + (1 + 1) + 1 = 11 comparisons in
// four rounds; in general floor(K/2) + 2 (ceil(K/2) - 1) + 1 in 2 + ceil(log2(ceil(K/2))) rounds, whatever the answers.
//
// - Where a number is odd, the last has a bye and comes first in the next round. A bye of round one goes to both sides,
//   so under a total order best and worst are always the true ones. Under any other it may end on both: cyclic, dropped
//   without a last comparison.
// - With K = 2 or 3 the last pair has always met before: its answer is used again and one comparison saved.
// - Completions of one class are identical and tie without being asked about.
// - The order of the bracket and the winner of a tie come from a counter-based key of (seed, step, prompt id), not from
//   the index, so no position is favoured and a repetition gives the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fastpref {

inline constexpr std::int32_t kMaxContestants = 1 << 16;

enum class Outcome : std::int8_t {
  kKept = 0,       // the best wins the last comparison
  kWorstWon = 1,   // the worst wins it: the judge contradicts itself
  kTie = 2,        // it is even
  kIdentical = 3,  // best and worst are the same completion in two copies
  kCyclic = 4,     // a bye both won among winners and lost among losers
};

struct Match {
  std::int64_t prompt;  // index into the batch
  std::int32_t first;
  std::int32_t second;
};

class Tournament {
 public:
  // `classes` is empty or holds a number for each of K completions of each prompt: equal numbers, equal completions.
  // Throws std::invalid_argument where K is not in [2, kMaxContestants] or a size does not fit.
  Tournament(std::span<const std::int64_t> prompt_ids, std::int64_t k, std::uint64_t step, std::uint64_t seed,
             std::span<const std::int32_t> classes);

  // All pairs of this round that the judge must compare; empty only when everything is decided.
  const std::vector<Match>& questions() const { return questions_; }

  // Takes p(first beats second) of each question and moves to the next round. Throws std::invalid_argument, and stays
  // where it is, where one is not in [0, 1] or there is another number of them.
  void answer(std::span<const float> probabilities);

  // Of each prompt, once nothing is left to ask.
  const std::vector<std::int32_t>& best() const { return best_; }
  const std::vector<std::int32_t>& worst() const { return worst_; }
  const std::vector<float>& preference() const { return preference_; }  // p(best beats worst)
  const std::vector<Outcome>& outcomes() const { return outcomes_; }
  const std::vector<std::int32_t>& asked() const { return asked_; }  // questions, those of earlier rounds included

 private:
  std::uint64_t draw(std::size_t prompt, std::uint64_t counter) const;
  bool same(std::size_t prompt, std::int32_t a, std::int32_t b) const;
  void pair_up();
  void settle(std::span<const float> answers);
  void settle_last(std::span<const float> answers);
  void advance(std::span<const float> probabilities);

  std::size_t prompts_;
  std::size_t k_;
  std::vector<std::uint64_t> keys_;     // of each prompt
  std::vector<std::int32_t> classes_;   // [prompts, K], or empty
  std::vector<std::int32_t> field_;     // [prompts, sides, size]: who is still in it
  std::size_t sides_ = 1;               // one in the first round, then winners and losers
  std::size_t size_;                    // contestants of each side
  std::uint64_t played_ = 0;            // matches of each prompt in earlier rounds
  std::vector<Match> matches_;          // of this round, the same number for each prompt
  std::vector<Match> questions_;        // those of them that must be asked
  std::vector<std::size_t> positions_;  // of the questions among the matches
  std::vector<float> known_;            // [prompts, K, K]: answers so far, where K is 2 or 3
  std::vector<std::int32_t> best_, worst_, asked_;
  std::vector<float> preference_;
  std::vector<Outcome> outcomes_;
};

}  // namespace fastpref
