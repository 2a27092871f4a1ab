// Work shared among the threads of the OpenMP runtime that torch already runs, so that the process has one pool.
//
// No -fopenmp and no omp.h: the runtime's entry point (GOMP_parallel, which libgomp, libomp and libiomp5 all export)
// is handed over after loading. Without it everything runs on the calling thread.
#pragma once
#include <atomic>
#include <cstdint>

namespace fn {

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Fork fork_threads;

// Calls body(i) once for each 0 <= i < n, in any order. Who takes which i is a race, so a body writes only its own
// outputs and sums nothing across items: results do not depend on the number of threads.
template <class Body>
void each(int64_t n, int threads, const Body& body) {
    struct Shared {
        const Body& body;
        int64_t n;
        std::atomic<int64_t> next;
    } shared{body, n, {0}};
    auto run = [](void* p) {
        auto& s = *static_cast<Shared*>(p);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n;) s.body(i);
    };
    if (threads > n) threads = static_cast<int>(n);
    if (threads > 1 && fork_threads)
        fork_threads(run, &shared, static_cast<unsigned>(threads), 0);
    else
        run(&shared);
}

}  // namespace fn
