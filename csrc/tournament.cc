#include "tournament.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "hash.h"

namespace fastpref {
namespace {

constexpr float kEven = 0.5F;
// Up to here the best and the worst have always met before the last round.
constexpr std::size_t kAlwaysMet = 3;

}  // namespace

Tournament::Tournament(std::span<const std::int64_t> prompt_ids, std::int64_t k, std::uint64_t step,
                       std::uint64_t seed, std::span<const std::int32_t> classes)
    : prompts_(prompt_ids.size()), k_(static_cast<std::size_t>(k)), classes_(classes.begin(), classes.end()), size_(k_) {
  if (k < 2 || k > kMaxContestants) {
    throw std::invalid_argument("k must be in [2, " + std::to_string(kMaxContestants) + "], got " + std::to_string(k) +
                                "; a tournament needs at least two completions of each prompt");
  }
  if (prompts_ > std::numeric_limits<std::size_t>::max() / (k_ * k_)) {
    throw std::invalid_argument("prompts times k squared must fit into 64 bits, got " + std::to_string(prompts_) +
                                " prompts");
  }
  if (!classes.empty() && classes.size() != prompts_ * k_) {
    throw std::invalid_argument("classes must have one entry for each of the " + std::to_string(prompts_ * k_) +
                                " completions, got " + std::to_string(classes.size()));
  }
  const std::uint64_t round_key = mix64(mix64(seed + kGoldenRatio) + step + kGoldenRatio);
  for (const std::int64_t id : prompt_ids) {
    keys_.push_back(mix64(round_key + static_cast<std::uint64_t>(id) + kGoldenRatio));
  }
  field_.resize(prompts_ * k_);
  std::vector<std::pair<std::uint64_t, std::int32_t>> order(k_);
  for (std::size_t prompt = 0; prompt < prompts_; ++prompt) {
    for (std::size_t i = 0; i < k_; ++i) order[i] = {draw(prompt, i), static_cast<std::int32_t>(i)};
    std::sort(order.begin(), order.end());
    for (std::size_t i = 0; i < k_; ++i) field_[prompt * k_ + i] = order[i].second;
  }
  if (k_ <= kAlwaysMet) known_.assign(prompts_ * k_ * k_, kEven);
  best_.resize(prompts_);
  worst_.resize(prompts_);
  asked_.assign(prompts_, 0);
  preference_.assign(prompts_, kEven);
  outcomes_.resize(prompts_);
  pair_up();
  if (questions_.empty()) advance({});
}

std::uint64_t Tournament::draw(std::size_t prompt, std::uint64_t counter) const {
  return mix64(keys_[prompt] + kGoldenRatio * (counter + 1));
}

bool Tournament::same(std::size_t prompt, std::int32_t a, std::int32_t b) const {
  const std::size_t row = prompt * k_;
  return a == b || (!classes_.empty() && classes_[row + static_cast<std::size_t>(a)] ==
                                             classes_[row + static_cast<std::size_t>(b)]);
}

void Tournament::pair_up() {
  matches_.clear();
  questions_.clear();
  positions_.clear();
  const bool last = size_ == 1;
  for (std::size_t prompt = 0; prompt < prompts_; ++prompt) {
    const std::int32_t* in = field_.data() + prompt * sides_ * size_;
    const auto meet = [&](std::int32_t first, std::int32_t second) {
      const Match match{static_cast<std::int64_t>(prompt), first, second};
      if (!same(prompt, first, second) && !(last && k_ <= kAlwaysMet)) {
        positions_.push_back(matches_.size());
        questions_.push_back(match);
        ++asked_[prompt];
      }
      matches_.push_back(match);
    };
    if (last) {
      meet(in[0], in[1]);
      continue;
    }
    for (std::size_t side = 0; side < sides_; ++side, in += size_) {
      for (std::size_t i = 0; i + 1 < size_; i += 2) meet(in[i], in[i + 1]);
    }
  }
}

void Tournament::answer(std::span<const float> probabilities) {
  if (probabilities.size() != questions_.size()) {
    throw std::invalid_argument("probabilities must have one entry for each of the " +
                                std::to_string(questions_.size()) + " questions, got " +
                                std::to_string(probabilities.size()));
  }
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    // A NaN fails both comparisons.
    if (!(probabilities[i] >= 0 && probabilities[i] <= 1)) {
      throw std::invalid_argument("probabilities must be in [0, 1], got " + std::to_string(probabilities[i]) +
                                  " for completions " + std::to_string(questions_[i].first) + " and " +
                                  std::to_string(questions_[i].second) + " of prompt " +
                                  std::to_string(questions_[i].prompt) + "; return p(first beats second)");
    }
  }
  if (!questions_.empty()) advance(probabilities);
}

// Settles this round, and those after it that hold no question.
void Tournament::advance(std::span<const float> probabilities) {
  do {
    std::vector<float> answers(matches_.size(), kEven);
    for (std::size_t i = 0; i < probabilities.size(); ++i) answers[positions_[i]] = probabilities[i];
    probabilities = {};
    if (size_ == 1) {
      settle_last(answers);
      matches_.clear();
      questions_.clear();
      return;
    }
    settle(answers);
    pair_up();
  } while (questions_.empty());
}

void Tournament::settle(std::span<const float> answers) {
  const std::size_t pairs = size_ / 2;
  const std::size_t bye = size_ % 2;
  const std::size_t next = pairs + bye;
  std::vector<std::int32_t> field(prompts_ * 2 * next);
  for (std::size_t prompt = 0; prompt < prompts_; ++prompt) {
    for (std::size_t side = 0; side < 2; ++side) {
      const std::size_t from = sides_ == 1 ? 0 : side;
      std::int32_t* out = field.data() + (prompt * 2 + side) * next;
      if (bye == 1) out[0] = field_[(prompt * sides_ + from + 1) * size_ - 1];
      for (std::size_t i = 0; i < pairs; ++i) {
        const std::size_t played = from * pairs + i;
        const std::size_t at = prompt * sides_ * pairs + played;
        const Match& match = matches_[at];
        const bool tie_to_second = draw(prompt, k_ + played_ + played) >> 63 != 0;
        const bool second_wins = answers[at] == kEven ? tie_to_second : answers[at] < kEven;
        // Side 0 goes on with the winner, side 1 with the loser.
        out[bye + i] = second_wins == (side == 0) ? match.second : match.first;
        if (!known_.empty()) {
          float* known = known_.data() + prompt * k_ * k_;
          known[static_cast<std::size_t>(match.first) * k_ + static_cast<std::size_t>(match.second)] = answers[at];
          known[static_cast<std::size_t>(match.second) * k_ + static_cast<std::size_t>(match.first)] = 1 - answers[at];
        }
      }
    }
  }
  played_ += sides_ * pairs;
  field_ = std::move(field);
  sides_ = 2;
  size_ = next;
}

void Tournament::settle_last(std::span<const float> answers) {
  for (std::size_t prompt = 0; prompt < prompts_; ++prompt) {
    const Match& match = matches_[prompt];
    const auto a = static_cast<std::size_t>(match.first);
    const auto b = static_cast<std::size_t>(match.second);
    const float p = known_.empty() ? answers[prompt] : known_[(prompt * k_ + a) * k_ + b];
    best_[prompt] = match.first;
    worst_[prompt] = match.second;
    preference_[prompt] = p;
    outcomes_[prompt] = a == b                                  ? Outcome::kCyclic
                        : same(prompt, match.first, match.second) ? Outcome::kIdentical
                        : p > kEven                             ? Outcome::kKept
                        : p < kEven                             ? Outcome::kWorstWon
                                                                : Outcome::kTie;
  }
}

}  // namespace fastpref
