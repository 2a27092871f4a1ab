// Threads that help the calling thread through a piece of work, and that it never waits for in vain.
//
// An OpenMP region ends when every thread of its team has come, also one that the system has not let run yet: beside one
// other busy process a step of a few hundred short regions then takes sixty times as long, a time slice for each. Here
// work is shared out as it is taken (see parallel.h), so whoever comes late finds the piece closed and is not missed.
//
// One word says everything: the number of the piece, whether it is open, and how many helpers are inside.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace {

using Run = void (*)(void*);

constexpr uint32_t INSIDE = 0xff, OPEN = 0x100, NEXT = 0x200;
constexpr int MOST = 128;     // helpers
constexpr int SPINS = 4000;   // looks at the word before a helper sleeps: some 100 us, longer than the gaps within a step

std::atomic<uint32_t> word{0};  // piece << 9 | open << 8 | helpers inside
std::atomic<uint32_t> wanted{0};  // helpers that may take part in the piece
std::atomic<int> asleep{0};
std::atomic_flag busy = ATOMIC_FLAG_INIT;  // a piece at a time
Run run;
void* argument;
int helpers = 0;
pid_t owner = 0;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_while(uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    if (word.load() == seen) usleep(50);
#endif
}

void wake() {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

void* help(void* self) {
    const uint32_t number = uint32_t(reinterpret_cast<uintptr_t>(self));
    uint32_t done = ~uint32_t(0);  // the piece this helper was in last
    for (int spins = 0;;) {
        uint32_t seen = word.load(std::memory_order_acquire);
        if ((seen & OPEN) && seen / NEXT != done && number < wanted.load(std::memory_order_relaxed)) {
            if (!word.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            run(argument);
            done = seen / NEXT;
            word.fetch_sub(1, std::memory_order_release);
            spins = 0;
        } else if (++spins < SPINS) {
            relax();
        } else {
            asleep.fetch_add(1);
            sleep_while(seen);
            asleep.fetch_sub(1);
            spins = 0;
        }
    }
    return nullptr;
}

}  // namespace

// Calls body(argument) in this thread and in up to threads - 1 others, and returns when all that came are done. They may be
// fewer, down to this thread alone, so a body takes its share from what is left. The signature is that of GOMP_parallel.
extern "C" void fn_fork(Run body, void* data, unsigned threads, unsigned) {
    if (threads < 2 || busy.test_and_set(std::memory_order_acquire)) return body(data);  // another engine's piece runs
    if (owner != getpid()) helpers = 0, owner = getpid();  // threads do not survive a fork
    for (; helpers < int(threads) - 1 && helpers < MOST; helpers++) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, help, reinterpret_cast<void*>(uintptr_t(helpers)))) break;
        pthread_detach(thread);
    }
    run = body, argument = data;
    wanted.store(threads - 1, std::memory_order_relaxed);
    uint32_t now = (word.load(std::memory_order_relaxed) & ~(NEXT - 1)) + NEXT + OPEN;
    word.store(now);
    if (asleep.load() > 0) wake();
    body(data);
    word.fetch_and(~OPEN, std::memory_order_acq_rel);
    for (int spins = 0; word.load(std::memory_order_acquire) & INSIDE;) ++spins < SPINS ? relax() : void(sched_yield());
    busy.clear(std::memory_order_release);
}
