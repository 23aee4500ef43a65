// Drives a fuzz target where the compiler has no libFuzzer: replays the corpus, then mutates it, keeping what reaches new
// edges of the control flow. Takes the flags of libFuzzer that tests/native/fuzz gives. The same seed gives the same
// inputs; only a limit of time is not exact.
//
// The code under test is compiled with -fsanitize-coverage=trace-pc, which calls the hook below; this file is not.
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <sanitizer/common_interface_defs.h>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
namespace fs = std::filesystem;

constexpr std::uint64_t kFirstPulse = std::uint64_t{1} << 20;
constexpr std::size_t kEdges = std::size_t{1} << 16;
unsigned char seen[kEdges];
std::size_t edges = 0;
thread_local std::uintptr_t previous = 0;

const Bytes* current = nullptr;
std::string artifact_prefix;

std::uint64_t hash_of(const Bytes& bytes) {
  std::uint64_t hash = 0xCBF29CE484222325;
  for (const std::uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001B3;
  return hash;
}

std::string name_of(const Bytes& bytes) {
  char name[17];
  std::snprintf(name, sizeof(name), "%016llx", static_cast<unsigned long long>(hash_of(bytes)));
  return name;
}

void save(const std::string& path, const Bytes& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// Of a process that is about to end: what may still fail is of no account.
void save_current() {
  if (current == nullptr) return;
  const Bytes& bytes = *current;
  current = nullptr;
  const std::string path = artifact_prefix + "crash-" + name_of(bytes);
  save(path, bytes);
  std::fprintf(stderr, "the input that failed is in %s (%zu bytes)\n", path.c_str(), bytes.size());
}

void on_abort(int) {
  save_current();
  std::_Exit(1);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t x = state_ += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
  }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(next() % bound); }

 private:
  std::uint64_t state_;
};

constexpr std::uint64_t kInteresting[] = {
    0, 1, 2, 7, 8, 63, 64, 127, 128, 255, 256, 511, 512, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF,
    0x3F000000, 0x3F800000, 0x7F800000, 0x7FC00000, 0xBF800000, 0x3EFFFFFF, 0x3F000001,  // 1/2, 1, infinity, NaN, -1, near 1/2
};

void mutate(Bytes& bytes, const std::vector<Bytes>& corpus, Random& random, std::size_t max_size) {
  for (std::size_t rounds = std::size_t{1} << random.below(4); rounds > 0; --rounds) {
    const std::size_t size = bytes.size();
    const std::size_t at = random.below(size + 1);
    const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    const auto stretch = [&](std::size_t most) {
      return static_cast<std::ptrdiff_t>(std::min(size - at, 1 + random.below(most)));
    };
    switch (random.below(8)) {
      case 0:
        if (at < size) bytes[at] ^= static_cast<std::uint8_t>(1U << random.below(8));
        break;
      case 1:
        if (at < size) bytes[at] = static_cast<std::uint8_t>(random.next());
        break;
      case 2:
        if (at < size) bytes[at] = static_cast<std::uint8_t>(bytes[at] + random.below(33) - 16);
        break;
      case 3: {
        const std::uint64_t value = kInteresting[random.below(std::size(kInteresting))];
        const std::size_t width = std::min(size - at, std::size_t{1} << random.below(4));
        if (width > 0) std::memcpy(bytes.data() + at, &value, width);
        break;
      }
      case 4: {
        Bytes fresh(1 + random.below(16));
        for (std::uint8_t& byte : fresh) byte = static_cast<std::uint8_t>(random.next());
        bytes.insert(place, fresh.begin(), fresh.end());
        break;
      }
      case 5:
        bytes.erase(place, place + stretch(64));
        break;
      case 6: {
        const Bytes copy(place, place + stretch(128));
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(random.below(size + 1)), copy.begin(), copy.end());
        break;
      }
      default: {
        const Bytes& other = corpus[random.below(corpus.size())];
        if (other.empty()) break;
        const std::size_t from = random.below(other.size());
        const std::size_t count = std::min(other.size() - from, 1 + random.below(256));
        const auto begin = other.begin() + static_cast<std::ptrdiff_t>(from);
        bytes.insert(place, begin, begin + static_cast<std::ptrdiff_t>(count));
      }
    }
  }
  if (bytes.size() > max_size) bytes.resize(max_size);
}

// Whether the input reached an edge that none before it had.
bool run(const Bytes& bytes) {
  const std::size_t before = edges;
  previous = 0;
  current = &bytes;
  // A copy of exactly this size, so that the sanitizer sees a read past the end.
  const Bytes exact(bytes);
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  current = nullptr;
  return edges > before;
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  const std::size_t edge = static_cast<std::size_t>((here ^ (previous << 1)) * 0x9E3779B97F4A7C15 >> 48) % kEdges;
  previous = here;
  if (seen[edge] == 0) {
    seen[edge] = 1;
    ++edges;
  }
}

int main(int count, char** arguments) {
  std::uint64_t runs = 0;
  std::uint64_t seed = 1;
  std::size_t max_size = 4096;
  double seconds = 0;
  std::vector<std::string> folders;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    const auto value = [&](std::string_view flag) -> const char* {
      return argument.starts_with(flag) ? arguments[i] + flag.size() : nullptr;
    };
    if (const char* text = value("-runs=")) {
      runs = std::strtoull(text, nullptr, 10);
    } else if (const char* text = value("-max_total_time=")) {
      seconds = std::strtod(text, nullptr);
    } else if (const char* text = value("-seed=")) {
      seed = std::strtoull(text, nullptr, 10);
    } else if (const char* text = value("-max_len=")) {
      max_size = std::strtoull(text, nullptr, 10);
    } else if (const char* text = value("-artifact_prefix=")) {
      artifact_prefix = text;
    } else if (argument.starts_with("-")) {
      std::fprintf(stderr, "unknown flag %s\n", arguments[i]);
      return 2;
    } else {
      folders.emplace_back(argument);
    }
  }
  __sanitizer_set_death_callback(save_current);
  std::signal(SIGABRT, on_abort);

  std::vector<fs::path> files;
  for (const std::string& folder : folders) {
    if (fs::is_regular_file(folder)) files.emplace_back(folder);
    if (!fs::is_directory(folder)) continue;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::vector<Bytes> corpus(1);
  run(corpus[0]);
  for (const fs::path& file : files) {
    std::ifstream stream(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    run(corpus.back());
  }
  std::fprintf(stderr, "%zu inputs reach %zu edges\n", corpus.size(), edges);

  const auto began = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  Random random(seed);
  std::uint64_t done = 0;
  while ((runs == 0 || done < runs) && (seconds == 0 || elapsed() < seconds) && (runs > 0 || seconds > 0)) {
    // Half of the time from the newest, which nothing has been built on yet.
    const std::size_t newest = std::min<std::size_t>(corpus.size(), 16);
    Bytes bytes = corpus[random.below(2) == 0 ? corpus.size() - 1 - random.below(newest) : random.below(corpus.size())];
    mutate(bytes, corpus, random, max_size);
    ++done;
    if ((done & (done - 1)) == 0 && done >= kFirstPulse) {
      std::fprintf(stderr, "%llu runs in %.0f s\n", static_cast<unsigned long long>(done), elapsed());
    }
    if (run(bytes)) {
      if (!folders.empty() && fs::is_directory(folders[0])) save(folders[0] + "/" + name_of(bytes), bytes);
      corpus.push_back(std::move(bytes));
    }
  }
  std::fprintf(stderr, "%llu runs in %.0f s, %zu inputs reach %zu edges\n", static_cast<unsigned long long>(done),
               elapsed(), corpus.size(), edges);
  return 0;
}
