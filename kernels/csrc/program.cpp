// A recorded list of calls, made again without an interpreter between them.
//
// Every function takes only integers and pointers, so one signature serves all: arguments that a function does not look
// for lie beyond those it does (registers and stack of the System V and AArch64 conventions), where they harm nobody.
#include <cstdint>

namespace {

constexpr int MOST = 32;        // arguments of a call
constexpr int WORDS = MOST + 2;  // function, whether its result says that it failed, arguments

using I = int64_t;
using Function = I (*)(I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I);

}  // namespace

// words: `calls` times WORDS. moves: `count` triples (word, base, offset): that word becomes bases[base] + offset first.
// Returns 0, or the number of the call that failed, from 1 up; those after it are not made.
extern "C" int64_t fn_run_program(I* words, int64_t calls, const I* moves, int64_t count, const I* bases) {
    for (int64_t i = 0; i < count; i++) words[moves[3 * i]] = bases[moves[3 * i + 1]] + moves[3 * i + 2];
    for (int64_t c = 0; c < calls; c++) {
        const I *w = words + c * WORDS, *a = w + 2;
        const I result = reinterpret_cast<Function>(w[0])(
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
            a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31]);
        if (w[1] && static_cast<int32_t>(result) != 0) return c + 1;
    }
    return 0;
}
