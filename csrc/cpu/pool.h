// Parallel loops on the threads that torch's OpenMP runtime has already, where the process has one; else on a small pool of our own. The core brings
// no runtime with it: a second one would fight torch's for the cores.
#pragma once
#include <cstdint>
#include <functional>

namespace fa::cpu {

// Calls body(first, last) over disjoint ranges that cover [0, items), each of at least `grain` items where possible, on up to
// `threads` threads (the caller's included), and returns when all are done. The ranges are handed out dynamically, so `body` must not
// depend on which thread runs it. A forked child runs everything on the calling thread: the other threads do not exist there.
void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace fa::cpu
