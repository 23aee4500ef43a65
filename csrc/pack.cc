#include "pack.h"

#include <algorithm>
#include <bit>

namespace fastpref {
namespace {

constexpr std::int32_t kNone = -1;
constexpr int kIndexBits = 16;  // kMaxWindow places

constexpr std::uint64_t bit(std::size_t at) { return std::uint64_t{1} << (at % 64); }

}  // namespace

Packer::Packer(Size capacity, std::int32_t max_pairs)
    : capacity_(capacity),
      max_pairs_(max_pairs),
      newest_(static_cast<std::size_t>(capacity.tokens) + 1, kNone),
      some_(newest_.size() / 64 + 1, 0),
      some_words_(some_.size() / 64 + 1, 0) {}

void Packer::insert(std::int32_t row) {
  Open& open = open_[row];
  const auto at = static_cast<std::size_t>(open.tokens);
  open.older = newest_[at];
  open.newer = kNone;
  if (open.older != kNone) open_[open.older].newer = row;
  newest_[at] = row;
  some_[at / 64] |= bit(at);
  some_words_[at / 4096] |= bit(at / 64);
}

void Packer::remove(std::int32_t row) {
  const Open& open = open_[row];
  const auto at = static_cast<std::size_t>(open.tokens);
  if (open.older != kNone) open_[open.older].newer = open.newer;
  if (open.newer != kNone) {
    open_[open.newer].older = open.older;
    return;
  }
  newest_[at] = open.older;
  if (open.older != kNone) return;
  some_[at / 64] &= ~bit(at);
  if (some_[at / 64] == 0) some_words_[at / 4096] &= ~bit(at / 64);
}

// The fewest places, at least `tokens`, that some row has left, or kNone.
std::int32_t Packer::first_with(std::int32_t tokens) const {
  const auto at = static_cast<std::size_t>(tokens);
  if (at >= newest_.size()) return kNone;
  std::size_t word = at / 64;
  std::uint64_t bits = some_[word] & (~std::uint64_t{0} << (at % 64));
  if (bits == 0) {
    ++word;
    std::size_t above = word / 64;
    if (above >= some_words_.size()) return kNone;
    std::uint64_t words = some_words_[above] & (~std::uint64_t{0} << (word % 64));
    while (words == 0) {
      if (++above >= some_words_.size()) return kNone;
      words = some_words_[above];
    }
    word = above * 64 + static_cast<std::size_t>(std::countr_zero(words));
    bits = some_[word];
  }
  return static_cast<std::int32_t>(word * 64) + std::countr_zero(bits);
}

std::int32_t Packer::find(Size pair) const {
  for (std::int32_t left = first_with(pair.tokens); left != kNone; left = first_with(left + 1)) {
    for (std::int32_t row = newest_[left]; row != kNone; row = open_[row].older) {
      if (open_[row].prompt >= pair.prompt) return row;
    }
  }
  return kNone;
}

void Packer::pack(std::span<const std::int32_t> pairs, std::span<const Size> sizes, Rows& rows) {
  order_.clear();
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const Size size = sizes[pairs[i]];
    const std::uint64_t share =
        capacity_.prompt == 0
            ? static_cast<std::uint64_t>(size.tokens)
            : std::max(static_cast<std::uint64_t>(size.tokens) * static_cast<std::uint64_t>(capacity_.prompt),
                       static_cast<std::uint64_t>(size.prompt) * static_cast<std::uint64_t>(capacity_.tokens));
    // Falling share, then rising index, in one number: shares take 48 bits.
    order_.push_back(((std::uint64_t{1} << 48) - share) << kIndexBits | i);
  }
  std::sort(order_.begin(), order_.end());

  row_of_.clear();
  for (const std::uint64_t key : order_) {
    const Size size = sizes[pairs[key & (kMaxWindow - 1)]];
    std::int32_t row = find(size);
    if (row == kNone) {
      row = static_cast<std::int32_t>(open_.size());
      open_.push_back({capacity_.tokens, capacity_.prompt, max_pairs_, kNone, kNone});
    } else {
      remove(row);
    }
    Open& open = open_[row];
    open.tokens -= size.tokens;
    open.prompt -= size.prompt;
    if (--open.pairs > 0) insert(row);
    row_of_.push_back(row);
  }

  const std::size_t first = rows.pairs.size();
  const std::size_t first_row = rows.ends.size();
  rows.pairs.resize(first + pairs.size());
  // Where the next pair of each row goes; afterwards where the row ends.
  auto at = static_cast<std::int64_t>(first);
  for (const Open& open : open_) {
    rows.ends.push_back(at);
    at += max_pairs_ - open.pairs;
  }
  for (std::size_t i = 0; i < order_.size(); ++i) {
    rows.pairs[rows.ends[first_row + row_of_[i]]++] = pairs[order_[i] & (kMaxWindow - 1)];
  }
  for (std::size_t row = 0; row < open_.size(); ++row) {
    if (open_[row].pairs > 0) remove(static_cast<std::int32_t>(row));
  }
  open_.clear();
}

}  // namespace fastpref
