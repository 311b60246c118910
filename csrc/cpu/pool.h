// A small thread pool of our own: the core must not bring a second OpenMP runtime into a process that already has torch's.
#pragma once
#include <cstdint>
#include <functional>

namespace fa::cpu {

// Calls body(first, last) over disjoint ranges that cover [0, items), each of at least `grain` items where possible, on up to
// `threads` threads (the caller's included), and returns when all are done. The ranges are handed out dynamically, so `body` must not
// depend on which thread runs it. A forked child runs everything on the calling thread: the pool's threads do not exist there.
void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace fa::cpu
