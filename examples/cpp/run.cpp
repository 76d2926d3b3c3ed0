// What an artifact takes, whether it proves itself here, and how long it takes: run model.thresher [rounds]
#include "thresher.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: %s model.thresher [rounds]\n", argv[0]), 2;
  try {
    for (auto& [name, model] : thresher::load_all(argv[1])) {
      std::printf("%s\n", name.c_str());
      for (const thresher::Input& input : model.inputs()) {
        std::printf("  takes %s: %s", input.name.c_str(), input.dtype.c_str());
        for (size_t d = 0; d < input.shape.size(); ++d)
          std::printf(" %s", input.symbols[d].empty() ? std::to_string(input.shape[d]).c_str() : input.symbols[d].c_str());
        std::printf("\n");
      }
      for (size_t i : model.writes()) std::printf("  writes %s\n", model.inputs()[i].name.c_str());
      std::printf("  error %.2e\n", model.validate());
      std::vector<double> times;
      for (int i = 0, rounds = argc > 2 ? std::atoi(argv[2]) : 20; i < rounds; ++i) {
        auto start = std::chrono::steady_clock::now();
        model(model.example());
        times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
      }
      std::sort(times.begin(), times.end());
      std::printf("  %.3f ms (median of %zu)\n", times[times.size() / 2], times.size());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run: %s\n", error.what());
    return 1;
  }
  return 0;
}
