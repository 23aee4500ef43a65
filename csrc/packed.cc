#include "packed.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>

#include "buffer.h"

// Wider stores where the processor has them: a tenth of the whole time. Chosen when the library is loaded, which the
// sanitizers are not ready for.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTPREF_WIDE __attribute__((target_clones("avx2", "default"), flatten))
#else
#define FASTPREF_WIDE
#endif

namespace fastpref {
namespace {

std::int32_t* fill(std::int32_t* at, std::size_t count, std::int32_t value) { return std::fill_n(at, count, value); }

std::int32_t* copy(std::int32_t* at, std::span<const std::int32_t> tokens) {
  return std::copy(tokens.begin(), tokens.end(), at);
}

std::int32_t* count_up(std::int32_t* at, std::size_t count, std::int32_t first) {
  std::iota(at, at + count, first);
  return at + count;
}

}  // namespace

Size size_of(const Layout& layout, std::size_t prompt, std::size_t first, std::size_t second) {
  // Lengths are below 2^31 and so is their number: nothing here overflows.
  const bool both = second > 0;
  std::size_t tokens = first + second;
  if (layout.style == Style::kShared) tokens += prompt - 1;
  if (layout.style == Style::kSeparate) tokens += (prompt - 1) * (both ? 2 : 1);
  const std::size_t encoded = layout.style == Style::kEncoderDecoder ? prompt : 0;
  if (tokens > kMaxRowTokens || encoded > kMaxRowTokens) return {kTooLong, kTooLong};
  return {static_cast<std::int32_t>(tokens), static_cast<std::int32_t>(encoded)};
}

PackedOffsets offsets_of(const PackedShape& shape) {
  const auto rows = static_cast<std::size_t>(shape.rows);
  const std::array<std::size_t, 3> counts = {static_cast<std::size_t>(shape.tokens),
                                             static_cast<std::size_t>(shape.prompt),
                                             static_cast<std::size_t>(shape.pairs)};
  struct Item {
    std::size_t dimension, bytes;
  };
  constexpr std::array<Item, kFields> kItems = {{{0, 4}, {0, 4}, {0, 4}, {0, 4}, {0, 4}, {0, 4},
                                                 {1, 4}, {1, 4}, {1, 4},
                                                 {2, 8}, {2, 4}, {2, 1}, {2, 8}, {2, 8}, {2, 8}}};
  PackedOffsets offsets{};
  for (std::size_t field = 0; field < kFields; ++field) {
    offsets.at[field] = offsets.bytes;
    // Below 2^31 * 2^24 * 8 = 2^58 each: the sum cannot overflow.
    const std::size_t bytes = rows * counts[kItems[field].dimension] * kItems[field].bytes;
    // An empty field still needs an address of its own.
    offsets.bytes += (bytes / kAlignment + 1) * kAlignment;
  }
  if (offsets.bytes > static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max())) throw std::bad_alloc();
  return offsets;
}

PackedWriter::PackedWriter(const Layout& layout, const PackedShape& shape, std::int64_t first_row, std::byte* memory)
    : layout_(layout), shape_(shape), row_(first_row) {
  const PackedOffsets offsets = offsets_of(shape);
  const auto at = [&]<class T>(Field field, T*& pointer) { pointer = reinterpret_cast<T*>(memory + offsets.at[field]); };
  at(kTokens, tokens_);
  at(kTargets, targets_);
  at(kPositions, positions_);
  at(kPairs, pairs_);
  at(kStreams, streams_);
  at(kSequences, sequences_);
  at(kPromptTokens, prompt_tokens_);
  at(kPromptPositions, prompt_positions_);
  at(kPromptPairs, prompt_pairs_);
  at(kLengths, lengths_);
  at(kPreference, preference_);
  at(kWhere, where_);
  at(kIds, ids_);
  at(kRefLogps, ref_logps_);
  at(kScores, scores_);
}

void PackedWriter::label(std::size_t places, std::int32_t position, std::int32_t pair, std::int32_t stream,
                         std::int32_t sequence) {
  positions_ = count_up(positions_, places, position);
  pairs_ = fill(pairs_, places, pair);
  streams_ = fill(streams_, places, stream);
  sequences_ = fill(sequences_, places, sequence);
}

void PackedWriter::put_prompt(std::span<const std::int32_t> tokens, std::int32_t stream) {
  tokens_ = copy(tokens_, tokens);
  targets_ = fill(targets_, tokens.size(), 0);
  label(tokens.size(), 0, slot_, stream, -1);
}

void PackedWriter::put_completion(std::int32_t before, std::span<const std::int32_t> tokens, std::int32_t position,
                                  std::int32_t k) {
  if (tokens.empty()) return;
  *tokens_++ = before;
  tokens_ = copy(tokens_, tokens.first(tokens.size() - 1));
  targets_ = copy(targets_, tokens);
  const auto slot = static_cast<std::int32_t>(row_ * shape_.pairs + slot_);
  label(tokens.size(), position, slot_, 1 + k, 2 * slot + k);
}

void PackedWriter::put_encoded(std::span<const std::int32_t> tokens) {
  prompt_tokens_ = copy(prompt_tokens_, tokens);
  prompt_positions_ = count_up(prompt_positions_, tokens.size(), 0);
  prompt_pairs_ = fill(prompt_pairs_, tokens.size(), slot_);
}

FASTPREF_WIDE void PackedWriter::write(std::span<const Pair> pairs) {
  std::int32_t* const row_end = tokens_ + shape_.tokens;
  std::int32_t* const prompt_end = prompt_tokens_ + shape_.prompt;
  slot_ = 0;
  for (const Pair& pair : pairs) {
    const bool encoder = layout_.style == Style::kEncoderDecoder;
    if (encoder) put_encoded(pair.prompt);
    const auto context = pair.prompt.first(pair.prompt.size() - 1);
    if (layout_.style == Style::kShared) put_prompt(context, 0);
    for (std::int32_t k = 0; k < 2; ++k) {
      const auto& completion = pair.completions[static_cast<std::size_t>(k)];
      if (layout_.style == Style::kSeparate && !completion.empty()) put_prompt(context, 1 + k);
      put_completion(encoder ? layout_.start_token : pair.prompt.back(), completion,
                     encoder ? 0 : static_cast<std::int32_t>(context.size()), k);
      *lengths_++ = static_cast<std::int32_t>(completion.size());
      *ref_logps_++ = pair.ref_logps[static_cast<std::size_t>(k)];
      *scores_++ = pair.scores[static_cast<std::size_t>(k)];
    }
    *preference_++ = pair.preference;
    *where_++ = true;
    *ids_++ = pair.id;
    ++slot_;
  }
  const auto empty = static_cast<std::size_t>(shape_.pairs - slot_);
  lengths_ = std::fill_n(lengths_, 2 * empty, 0);
  ref_logps_ = std::fill_n(ref_logps_, 2 * empty, 0.0F);
  scores_ = std::fill_n(scores_, 2 * empty, 0.0F);
  preference_ = std::fill_n(preference_, empty, 0.0F);
  where_ = std::fill_n(where_, empty, false);
  ids_ = std::fill_n(ids_, empty, std::int64_t{-1});

  const auto places = static_cast<std::size_t>(row_end - tokens_);
  tokens_ = fill(tokens_, places, 0);
  targets_ = fill(targets_, places, 0);
  positions_ = fill(positions_, places, 0);
  pairs_ = fill(pairs_, places, -1);
  streams_ = fill(streams_, places, 0);
  sequences_ = fill(sequences_, places, -1);
  const auto encoded = static_cast<std::size_t>(prompt_end - prompt_tokens_);
  prompt_tokens_ = fill(prompt_tokens_, encoded, 0);
  prompt_positions_ = fill(prompt_positions_, encoded, 0);
  prompt_pairs_ = fill(prompt_pairs_, encoded, -1);
  ++row_;
}

}  // namespace fastpref
