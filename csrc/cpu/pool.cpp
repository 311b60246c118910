#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define FA_PAUSE() _mm_pause()
#else
#define FA_PAUSE() std::this_thread::yield()
#endif

namespace fa::cpu {
namespace {

constexpr int kSpins = 4000;  // a few microseconds: the passes of one step follow each other at once

// Every thread begins with a share of its own, the same at each call: what it touched in the last pass, and the translations of those addresses, are
// still in its core. Whoever is done takes from the others.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Job {
  static constexpr int kShares = 64;
  int64_t grain;
  int shares;
  const std::function<void(int64_t, int64_t)>& body;
  std::atomic<int> helpers{0};  // places left for pool threads
  std::exception_ptr error;
  std::mutex error_mutex;
  Share share[kShares];

  Job(int64_t items, int64_t g, int threads, const std::function<void(int64_t, int64_t)>& f)
      : grain(g), shares(std::min(threads, kShares)), body(f) {
    const int64_t pieces = (items + grain - 1) / grain;
    for (int k = 0; k < shares; ++k) {
      share[k].next = pieces * k / shares * grain;
      share[k].end = std::min(pieces * (k + 1) / shares * grain, items);
    }
  }

  void work(int thread) {
    for (int k = 0; k < shares; ++k) finish(share[(thread + k) % shares]);
  }

  void finish(Share& s) {
    for (;;) {
      const int64_t first = s.next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= s.end) return;
      try {
        body(first, std::min(first + grain, s.end));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        error = std::current_exception();
        for (int k = 0; k < shares; ++k) share[k].next.store(share[k].end);
      }
    }
  }
};

struct Pool {
  std::mutex mutex;  // guards generation, busy and the threads
  std::condition_variable wake, done;
  std::atomic<uint64_t> generation{0};
  int busy = 0, threads = 0;
  Job* job = nullptr;
  std::mutex caller;  // one parallel_for at a time; a second caller runs alone

  void loop(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation.load(std::memory_order_acquire) == seen; ++i) FA_PAUSE();
      Job* mine = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load() != seen; });
        seen = generation.load();
        if (job && job->helpers.fetch_sub(1) > 0) {
          mine = job;
          ++busy;
        }
      }
      if (!mine) continue;
      mine->work(thread);
      std::lock_guard<std::mutex> lock(mutex);
      if (--busy == 0) done.notify_one();
    }
  }

  void run(Job& j, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (; threads < helpers; ++threads) std::thread([this, thread = threads + 1] { loop(thread); }).detach();
      j.helpers = helpers;
      job = &j;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    j.work(0);
    std::unique_lock<std::mutex> lock(mutex);
    job = nullptr;  // a thread that wakes from here on finds nothing
    done.wait(lock, [&] { return busy == 0; });
  }
};

// libgomp's way into a parallel region, if the process has one: torch brings it and shows its symbols to everybody. Its threads spin for a while after
// each of torch's own regions; threads of ours would have to share the cores with them (int4 4096 x 4096
// times a vector on 2 EPYC cores: 1.27 ms, on its threads 0.67; AdamW over 5,000 tensors of 256: 4.4 and 2.0).
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

Team torch_team() {
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
}

int number_in_team() {
  static const auto number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return number ? number() : 0;
}

std::atomic<bool> forked{false};
// When the library is loaded, not at the first use: the parent's team, which a child must not enter, may be torch's work alone.
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Pool& pool() {
  // Never destroyed: its detached threads may outlive static destructors.
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (items <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (items + grain - 1) / grain;
  const int helpers = int(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers <= 0 || forked) return body(0, items);
  Pool& p = pool();
  std::unique_lock<std::mutex> alone(p.caller, std::try_to_lock);
  if (!alone.owns_lock()) return body(0, items);
  Job job(items, grain, threads, body);
  if (const Team team = torch_team()) {
    // Always as many as the caller named: a team that changes its size is set up anew.
    team([](void* mine) { static_cast<Job*>(mine)->work(number_in_team()); }, &job, unsigned(threads), 0);
  } else {
    p.run(job, helpers);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fa::cpu
