#include "pair_state.h"

#include <vector>

#include "codec.h"

namespace fastpref {
namespace {

constexpr std::string_view kMagic("FPPAIRS\0", 8);
constexpr std::uint64_t kFarthest = std::uint64_t{1} << 62;

std::string_view view(const std::array<unsigned char, kFingerprintBytes>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string text(const std::vector<RowShape>& shapes) {
  std::string joined;
  for (const RowShape& shape : shapes) {
    if (!joined.empty()) joined += ' ';
    joined += std::to_string(shape.rows);
    joined += 'x';
    joined += std::to_string(shape.capacity.tokens);
    if (shape.capacity.prompt == 0) continue;
    joined += '+';
    joined += std::to_string(shape.capacity.prompt);
  }
  return joined;
}

std::string text(Style style) {
  switch (style) {
    case Style::kShared: return "shared";
    case Style::kSeparate: return "separate";
    case Style::kEncoderDecoder: return "encoder-decoder";
  }
  return "none";
}

}  // namespace

std::string encode_pair_state(const PairIdentity& identity, const PairState& state) {
  std::string bytes(kMagic);
  put(bytes, kPairStateFormat);
  put(bytes, kPairPlanVersion);
  bytes += view(identity.fingerprint);
  bytes += view(identity.tokenizer);
  put(bytes, identity.pairs);
  put(bytes, identity.pack.seed);
  put(bytes, static_cast<std::uint32_t>(identity.layout.style));
  put(bytes, identity.layout.start_token);
  put(bytes, identity.pack.max_pairs);
  put(bytes, identity.pack.window);
  put(bytes, static_cast<std::uint32_t>(identity.pack.shapes.size()));
  for (const RowShape& shape : identity.pack.shapes) {
    put(bytes, shape.rows);
    put(bytes, shape.capacity.tokens);
    put(bytes, shape.capacity.prompt);
  }
  put(bytes, state.epoch);
  put(bytes, state.batch);
  put(bytes, state.plan);
  put(bytes, fnv1a(bytes));
  return bytes;
}

PairState decode_pair_state(std::string_view bytes, const PairIdentity& expected) {
  Reader reader = open_state(bytes, kMagic);
  require_equal("format", reader.number<std::uint32_t>(), kPairStateFormat);
  require_equal("plan version", reader.number<std::uint32_t>(), kPairPlanVersion);
  const std::string_view fingerprint = reader.take(kFingerprintBytes);
  const std::string_view tokenizer = reader.take(kFingerprintBytes);
  const auto pairs = reader.number<std::uint64_t>();
  const auto seed = reader.number<std::uint64_t>();
  const auto style = reader.number<std::uint32_t>();
  const auto start_token = reader.number<std::int32_t>();
  const auto max_pairs = reader.number<std::int32_t>();
  const auto window = reader.number<std::int32_t>();
  const auto count = reader.number<std::uint32_t>();
  if (count > kMaxRowShapes) damaged("more shapes than there can be");
  if (style > static_cast<std::uint32_t>(Style::kEncoderDecoder)) damaged("an unknown layout");
  std::vector<RowShape> shapes(count);
  for (RowShape& shape : shapes) {
    shape.rows = reader.number<std::int32_t>();
    shape.capacity.tokens = reader.number<std::int32_t>();
    shape.capacity.prompt = reader.number<std::int32_t>();
  }
  PairState state{};
  state.epoch = reader.number<std::uint64_t>();
  state.batch = reader.number<std::uint64_t>();
  state.plan = reader.number<std::uint64_t>();
  if (!reader.done()) damaged("bytes that go on too long");

  // The plainest differences first: other data has another fingerprint whatever else differs.
  require_equal("tokenizer hash", hex(tokenizer), hex(view(expected.tokenizer)));
  require_equal("number of pairs", pairs, expected.pairs);
  require_equal("data fingerprint", hex(fingerprint), hex(view(expected.fingerprint)));
  require_equal("seed", seed, expected.pack.seed);
  require_equal("layout", text(static_cast<Style>(style)), text(expected.layout.style));
  require_equal("decoder_start", start_token, expected.layout.start_token);
  require_equal("max_pairs_per_row", max_pairs, expected.pack.max_pairs);
  require_equal("window", window, expected.pack.window);
  require_equal("set of shapes (rows x row_tokens)", text(shapes), text(expected.pack.shapes));
  if (state.epoch >= kFarthest || state.batch >= kFarthest) damaged("a position beyond 2^62");
  return state;
}

}  // namespace fastpref
