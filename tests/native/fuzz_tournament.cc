// Tournaments under any answers: they end in time, ask only what may be asked, and say what the answers say.
#include <bit>
#include <cstdint>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tournament.h"
#include "input.h"

namespace {

using namespace fastpref;

struct Setting {
  std::vector<std::int64_t> ids;
  std::int64_t k;
  std::uint64_t step, seed;
  std::vector<std::int32_t> classes;
};

std::size_t rounds_of(std::size_t k) {
  std::size_t rounds = 1;
  for (std::size_t size = (k + 1) / 2; size > 1; size = (size + 1) / 2) ++rounds;
  return rounds + (k > 3 ? 1 : 0);
}

bool same_questions(const std::vector<Match>& a, const std::vector<Match>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].prompt != b[i].prompt || a[i].first != b[i].first || a[i].second != b[i].second) return false;
  }
  return true;
}

bool valid(float p) { return p >= 0 && p <= 1; }

void check_questions(const Setting& setting, const std::vector<Match>& questions) {
  std::set<std::pair<std::int64_t, std::pair<std::int32_t, std::int32_t>>> met;
  for (const Match& match : questions) {
    HOLDS(match.prompt >= 0 && match.prompt < static_cast<std::int64_t>(setting.ids.size()));
    for (const std::int32_t side : {match.first, match.second}) HOLDS(side >= 0 && side < setting.k);
    HOLDS(match.first != match.second);
    if (!setting.classes.empty()) {
      const auto row = static_cast<std::size_t>(match.prompt * setting.k);
      HOLDS(setting.classes[row + static_cast<std::size_t>(match.first)] !=
              setting.classes[row + static_cast<std::size_t>(match.second)]);
    }
    HOLDS(met.insert({match.prompt, {match.first, match.second}}).second);
  }
}

// Plays with the answers that the input gives, and notes them; or with those that were noted.
Tournament play(const Setting& setting, Input input, std::vector<float>& noted, bool replay) {
  Tournament tournament(setting.ids, setting.k, setting.step, setting.seed, setting.classes);
  std::size_t rounds = 0;
  std::size_t used = 0;
  while (!tournament.questions().empty()) {
    HOLDS(++rounds <= rounds_of(static_cast<std::size_t>(setting.k)));
    const std::vector<Match> questions = tournament.questions();
    check_questions(setting, questions);
    std::vector<float> answers(questions.size());
    bool good = true;
    for (float& p : answers) {
      if (replay) {
        p = noted[used++];
      } else {
        const std::uint64_t kind = input.number(1) % 8;
        p = kind == 0   ? std::bit_cast<float>(static_cast<std::uint32_t>(input.number(4)))
            : kind == 1 ? 0.5F
            : kind < 4  ? static_cast<float>(kind - 2)
                        : static_cast<float>(input.number(1) % 256) / 255;
      }
      good = good && valid(p);
    }
    if (!good) {
      bool refused = false;
      try {
        tournament.answer(answers);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      HOLDS(refused && same_questions(questions, tournament.questions()));
      for (float& p : answers) p = valid(p) ? p : 0.5F;
    }
    if (!replay) noted.insert(noted.end(), answers.begin(), answers.end());
    tournament.answer(answers);
  }
  return tournament;
}

void check_results(const Setting& setting, const Tournament& tournament) {
  const auto k = static_cast<std::size_t>(setting.k);
  const std::size_t most = k / 2 + 2 * ((k + 1) / 2 - 1) + (k > 3 ? 1 : 0);
  for (std::size_t i = 0; i < setting.ids.size(); ++i) {
    const std::int32_t best = tournament.best()[i];
    const std::int32_t worst = tournament.worst()[i];
    const float p = tournament.preference()[i];
    const Outcome outcome = tournament.outcomes()[i];
    HOLDS(best >= 0 && best < setting.k && worst >= 0 && worst < setting.k && valid(p));
    HOLDS(static_cast<std::size_t>(tournament.asked()[i]) <= most);
    HOLDS((outcome == Outcome::kCyclic) == (best == worst));
    HOLDS((outcome == Outcome::kKept) == (p > 0.5F));
    HOLDS((outcome == Outcome::kWorstWon) == (p < 0.5F));
    if (setting.classes.empty()) {
      HOLDS(outcome != Outcome::kIdentical);
      HOLDS(static_cast<std::size_t>(tournament.asked()[i]) + (best == worst && k > 3 ? 1 : 0) == most);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  Setting setting;
  setting.k = input.number(1) % 8 == 0 ? static_cast<std::int16_t>(input.number(2)) : static_cast<std::int64_t>(input.number(1) % 24);
  // Large ones are slow and no different.
  if (setting.k > 100) setting.k %= 100;
  setting.step = input.number(8);
  setting.seed = input.number(8);
  for (std::size_t prompts = input.number(1) % 5; prompts > 0; --prompts) setting.ids.push_back(static_cast<std::int8_t>(input.number(1)));
  const std::uint64_t kind = input.number(1) % 4;
  if (kind > 0 && setting.k > 0) {
    setting.classes.resize(setting.ids.size() * static_cast<std::size_t>(setting.k) + (kind == 3 ? 1 : 0));
    for (std::int32_t& number : setting.classes) number = static_cast<std::int32_t>(input.number(1) % 6);
  }
  const bool wrong_size = kind == 3 && setting.k > 0;
  try {
    std::vector<float> noted;
    const Tournament tournament = play(setting, input, noted, false);
    HOLDS(setting.k >= 2 && !wrong_size);
    check_results(setting, tournament);
    const Tournament again = play(setting, input, noted, true);
    HOLDS(tournament.best() == again.best() && tournament.worst() == again.worst() &&
            tournament.preference() == again.preference() && tournament.outcomes() == again.outcomes());
  } catch (const std::invalid_argument&) {
    HOLDS(setting.k < 2 || wrong_size);
  }
  return 0;
}
