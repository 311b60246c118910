// The emulator must run right kernels rightly and refuse wrong ones: each seeded bug below is one that breaks a GPU.
//   g++ -std=c++17 -g -O1 -DFA_EMULATE -fsanitize=address,undefined -fno-sanitize-recover=all
//       -Icsrc tests/cpp/test_emulator.cpp csrc/emulator/emulator.cpp
//   ./a.out            every case        ./a.out --list            their names        ./a.out CASE...            those
//   ./a.out --speed    nanoseconds per emulated thread (build with -O2 and no sanitizer)
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>
#include "emulator_kernels.h"

namespace {

using fa::emulator::Error;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void require(bool ok, const std::string& what) {
  if (!ok) throw Failure(what);
}

// --- cases ---

std::vector<float> ramp(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = -float(i) - 1;
  return x;
}

void expect_error(const std::string& part, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    std::printf("    %s\n", e.what());
    return require(std::string(e.what()).find(part) != std::string::npos, "the message should say '" + part + "'");
  }
  throw Failure("ran without an error; expected '" + part + "'");
}

// A race shows as a wrong result for some order; one seed of three must be enough.
void expect_wrong(const std::vector<float>& right, const std::function<void(float*)>& body) {
  int wrong = 0;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    fa::emulator::set_seed(seed);
    auto x = ramp(right.size());
    body(x.data());
    wrong += x != right;
  }
  require(wrong > 0, "three orders of the threads gave the right result");
}

void expect_death(const std::string& part, const std::function<void()>& body) {
  int end[2];
  require(pipe(end) == 0, "pipe");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(end[1], 2);
    body();
    _exit(0);
  }
  close(end[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = read(end[0], buffer, sizeof buffer)) > 0;) said.append(buffer, size_t(n));
  close(end[0]);
  int status = 0;
  waitpid(child, &status, 0);
  require(status != 0, "the process went on; is this built with -fsanitize=address,undefined ?");
  require(said.find(part) != std::string::npos, "the report should say '" + part + "'; it says " + said.substr(0, 400));
}

void check_sums() {
  const int rows = 7, columns = 1000;
  std::vector<float> x(rows * columns), out(rows);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 17);
  FA_LAUNCH(sum_rows, rows, 256, 0, nullptr, x.data(), out.data(), columns);
  fa::check(cudaGetLastError(), "check_sums");
  for (int r = 0; r < rows; ++r) {
    float sum = 0;
    for (int c = 0; c < columns; ++c) sum += x[size_t(r * columns + c)];
    require(out[size_t(r)] == sum, "row " + std::to_string(r));
  }
}

void check_coordinates() {
  for (const auto& [grid, block] :
       {std::pair<dim3, dim3>{5, 37}, {dim3(3, 2), dim3(8, 4)}, {dim3(2, 3, 4), dim3(5, 3, 2)}, {1, 1024}, {4097, 1}}) {
    std::vector<uint32_t> out(size_t(grid.x) * grid.y * grid.z * block.x * block.y * block.z);
    FA_LAUNCH(coordinates, grid, block, 0, nullptr, out.data());
    require(out == std::vector<uint32_t>(out.size(), 1), "every thread once");
  }
}

template <class T> void check_transpose() {
  const int rows = 21, columns = 50;
  std::vector<T> x(rows * columns), out(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = T(i);
  FA_LAUNCH(transpose<T>, dim3(4, 2), dim3(16, 16), 16 * 17 * sizeof(T), nullptr, x.data(), out.data(), rows, columns);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) require(out[size_t(c * rows + r)] == x[size_t(r * columns + c)], "transpose");
}

void check_vectors() {
  alignas(16) float x[4 * 32 + 4];
  for (float& v : x) v = 2;
  FA_LAUNCH(scale4, 1, 32, 0, nullptr, x, 3);
  require(x[0] == 6 && x[127] == 6 && x[128] == 2, "scaled");
  expect_error("vec_load needs an address that is a multiple of 16", [&] { FA_LAUNCH(scale4, 1, 32, 0, nullptr, x + 1, 3); });
}

void check_configuration() {
  float x = 0;
  const std::pair<dim3, dim3> bad[] = {
      {0, 32}, {1, 0}, {1, 1025}, {dim3(1, 65536), 1}, {dim3(1, 1, 65536), 1}, {1, dim3(32, 33)}, {1, dim3(1, 1, 65)}};
  for (const auto& [grid, block] : bad) {
    FA_LAUNCH(write_at, grid, block, 0, nullptr, &x, 0);
    require(cudaGetLastError() == cudaErrorInvalidConfiguration && x == 0, "refused as CUDA does");
  }
  FA_LAUNCH(write_at, 1, 32, 49153, nullptr, &x, 0);
  require(cudaGetLastError() == cudaErrorInvalidValue && x == 0, "too much dynamic shared memory");
  FA_LAUNCH(write_at, 1, 32, 49152, nullptr, &x, 0);
  require(cudaGetLastError() == cudaSuccess && x == 1, "runs after refused launches");
}

void check_seeds() {  // the order is random and is a function of the seed
  auto last = [](uint64_t seed) {
    int ticket = 0, block = -1;
    fa::emulator::set_seed(seed);
    FA_LAUNCH(count_blocks, 1000, 64, 0, nullptr, &ticket, &block);
    require(ticket == 1000 && block >= 0, "one block is the last");
    return block;
  };
  require(last(3) == last(3) && (last(3) != last(4) || last(4) != last(5)), "seeded order");
}

void check_recovery() {  // after a refused kernel the next one runs as if nothing had been
  for (int i = 0; i < 3; ++i) {
    expect_error("has exited", [] { FA_LAUNCH(barrier_after_exit, 2, 64, 0, nullptr); });
    check_sums();
  }
}

const std::vector<std::pair<std::string, std::function<void()>>> kCases = {
    {"block_reduction", check_sums},
    {"coordinates_1d_2d_3d", check_coordinates},
    {"dynamic_shared_memory", [] { check_transpose<float>(), check_transpose<double>(), check_transpose<short>(); }},
    {"warp_operations",
     [] {
       std::vector<uint32_t> ok(64);
       FA_LAUNCH(warp_operations, 1, 64, 0, nullptr, ok.data());
       require(ok == std::vector<uint32_t>(64, 1), "all lanes agree");
     }},
    {"vector_access_and_bug_misaligned", check_vectors},
    {"launch_configuration", check_configuration},
    {"seeded_order", check_seeds},
    {"recovers_after_an_error", check_recovery},
    {"many_deep_stacks",
     [] {
       float x = 1;
       FA_LAUNCH(deep_stack, 2, 1024, 0, nullptr, &x, 5);
       require(x == 1, "value");
     }},
    {"bug_missing_barrier",
     [] {
       auto right = ramp(64);
       std::reverse(right.begin(), right.end());
       expect_wrong(right, [](float* x) { FA_LAUNCH(missing_barrier, 1, 64, 0, nullptr, x); });
     }},
    {"bug_missing_second_barrier",
     [] { expect_wrong(ramp(64), [](float* x) { FA_LAUNCH(missing_second_barrier, 1, 64, 0, nullptr, x); }); }},
    {"bug_missing_syncwarp",
     [] {
       auto right = ramp(64);
       for (size_t i = 0; i < 64; i += 2) std::swap(right[i], right[i + 1]);
       expect_wrong(right, [](float* x) { FA_LAUNCH(missing_syncwarp, 1, 64, 0, nullptr, x); });
     }},
    {"bug_uninitialised_shared",
     [] {
       auto x = ramp(64);
       FA_LAUNCH(uninitialised_shared, 1, 64, 0, nullptr, x.data());
       require(std::isnan(x[0]) && std::isnan(x[63]), "poison reaches the result");
     }},
    {"bug_shared_of_another_block",
     [] {
       std::vector<float> out(8);
       FA_LAUNCH(stale_shared, 8, 32, 0, nullptr, out.data());
       require(out[0] == 1, "block 0");
       for (size_t b = 1; b < 8; ++b) require(std::isnan(out[b]), "poison in each block");
     }},
    {"bug_divergent_barrier",
     [] { expect_error("every thread of a block must reach one barrier", [] { FA_LAUNCH(divergent_barrier, 1, 64, 0, nullptr); }); }},
    {"bug_barrier_of_two_kinds", [] { expect_error("must reach one", [] { FA_LAUNCH(barrier_of_two_kinds, 1, 48, 0, nullptr); }); }},
    {"bug_barrier_after_exit", [] { expect_error("has exited", [] { FA_LAUNCH(barrier_after_exit, 1, 64, 0, nullptr); }); }},
    {"bug_barrier_in_uneven_loop", [] { expect_error("has exited", [] { FA_LAUNCH(barrier_in_uneven_loop, 1, 64, 0, nullptr); }); }},
    {"bug_shuffle_after_exit",
     [] {
       auto x = ramp(64);
       expect_error("thread 40 has exited", [&] { FA_LAUNCH(shuffle_after_exit, 1, 64, 0, nullptr, x.data()); });
     }},
    {"bug_shuffle_in_branches",
     [] {
       auto x = ramp(32);
       expect_error("move it out of the branch", [&] { FA_LAUNCH(shuffle_in_branches, 1, 32, 0, nullptr, x.data()); });
     }},
    {"bug_shuffle_without_self", [] { expect_error("its own mask", [] { FA_LAUNCH(shuffle_without_self, 1, 32, 0, nullptr); }); }},
    {"bug_shuffle_from_outside",
     [] { expect_error("must read a lane of its mask", [] { FA_LAUNCH(shuffle_from_outside, 1, 32, 0, nullptr); }); }},
    {"bug_shuffle_in_part_warp",
     [] { expect_error("lane 16 does not exist", [] { FA_LAUNCH(shuffle_in_part_warp, 1, 48, 0, nullptr); }); }},
    {"bug_vote_against_barrier", [] { expect_error("waits at syncthreads", [] { FA_LAUNCH(vote_against_barrier, 1, 32, 0, nullptr); }); }},
    {"bug_too_much_shared",
     [] {
       float x;
       expect_error("49152 bytes", [&] { FA_LAUNCH(too_much_shared, 1, 1, 0, nullptr, &x); });
     }},
    {"bug_write_out_of_bounds",
     [] {
       std::vector<float> x(64);
       expect_death("heap-buffer-overflow", [&] { FA_LAUNCH(write_at, 1, 1, 0, nullptr, x.data(), 64); });
     }},
    {"bug_shared_out_of_bounds",
     [] {
       float x = 0;
       expect_death("use-after-poison", [&] { FA_LAUNCH(shared_overrun, 1, 1, 0, nullptr, &x); });
     }},
};

int measure_speed() {
  std::vector<float> x(1 << 18);
  auto time = [&](const char* what, void (*kernel)(float*), unsigned threads) {
    double best = 1e9;
    for (int i = 0; i < 7; ++i) {
      const auto t0 = std::chrono::steady_clock::now();
      FA_LAUNCH(kernel, unsigned(x.size()) / threads, threads, 0, nullptr, x.data());
      best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - t0).count() / double(x.size()));
    }
    std::printf("%-36s %7.1f ns per thread\n", what, best);
  };
  time("no barrier, 512 threads a block", add_one, 512);
  time("no barrier, 32 threads a block", add_one, 32);
  time("3 barriers, 512 threads a block", three_barriers, 512);
  time("5 shuffles, 512 threads a block", five_shuffles, 512);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> chosen(argv + 1, argv + argc);
  if (chosen == std::vector<std::string>{"--speed"}) return measure_speed();
  if (chosen == std::vector<std::string>{"--list"}) {
    for (const auto& c : kCases) std::puts(c.first.c_str());
    return 0;
  }
  int ran = 0, failed = 0;
  for (const auto& [name, body] : kCases) {
    if (!chosen.empty() && std::find(chosen.begin(), chosen.end(), name) == chosen.end()) continue;
    ++ran;
    try {
      body();
      std::printf("ok   %s\n", name.c_str());
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAIL %s: %s\n", name.c_str(), e.what());
    }
  }
  std::printf("%d cases, %d failed\n", ran, failed);
  return failed || !ran;
}
