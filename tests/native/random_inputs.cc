// Stands in for libFuzzer where there is none: runs files, or so many random inputs of a seed.
//
//   driver RUNS SEED
//   driver FILE...
#include <cinttypes>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "input.h"

int main(int count, char** arguments) {
  if (count == 3 && std::strspn(arguments[1], "0123456789") == std::strlen(arguments[1])) {
    const std::uint64_t runs = std::strtoull(arguments[1], nullptr, 10);
    std::mt19937_64 random(std::strtoull(arguments[2], nullptr, 10));
    for (std::uint64_t run = 0; run < runs; ++run) {
      std::vector<std::uint8_t> input(random() % (std::uint64_t{1} << (random() % 11)));
      // Small bytes are likelier: most rules have their borders there.
      const int shift = static_cast<int>(random() % 8);
      for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>((random() & 0xFF) >> shift);
      LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%" PRIu64 " inputs\n", runs);
    return 0;
  }
  for (int i = 1; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    HOLDS(file.good());
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  return 0;
}
