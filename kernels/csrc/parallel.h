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

// The same, where neighbours share memory: each thread walks a range of its own in order, as the hardware foresees, and
// whoever has finished takes from the far end of another's range.
template <class Body>
void each_near(int64_t n, int threads, const Body& body) {
    constexpr int MOST = 256;
    struct alignas(64) Range {
        std::atomic<uint64_t> bounds;  // first << 32 | end
    };
    struct Shared {
        const Body& body;
        int threads;
        std::atomic<int> next{0};
        Range range[MOST];
    };
    if (threads > n) threads = static_cast<int>(n);
    if (threads > MOST) threads = MOST;
    if (threads <= 1 || !fork_threads) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
    Shared shared{body, threads, {}, {}};
    for (int t = 0; t < threads; t++)
        shared.range[t].bounds = uint64_t(n * t / threads) << 32 | uint64_t(n * (t + 1) / threads);
    auto run = [](void* p) {
        auto& s = *static_cast<Shared*>(p);
        const int self = s.next.fetch_add(1, std::memory_order_relaxed);
        for (int k = 0; k < s.threads; k++) {
            auto& bounds = s.range[(self + k) % s.threads].bounds;
            for (uint64_t b = bounds.load(std::memory_order_relaxed); b >> 32 < (b & 0xffffffff);) {
                const uint64_t rest = k == 0 ? b + (uint64_t(1) << 32) : b - 1;
                if (!bounds.compare_exchange_weak(b, rest, std::memory_order_relaxed)) continue;
                s.body(k == 0 ? int64_t(b >> 32) : int64_t(b & 0xffffffff) - 1);
                b = bounds.load(std::memory_order_relaxed);
            }
        }
    };
    fork_threads(run, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace fn
