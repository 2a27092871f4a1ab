// What every library of ours has: where its threads come from, and what it was compiled for.
#include "isa.h"
#include "parallel.h"

namespace fn {
Fork fork_threads = nullptr;
}

// Where to find threads; see parallel.h.
extern "C" void fn_use_threads(fn::Fork fork) { fn::fork_threads = fork; }

// To be shown to people.
extern "C" const char* fn_instructions() {
#if FN_AVX512_BF16
    return "AVX-512 with bfloat16";
#elif FN_AVX512
    return "AVX-512";
#elif FN_AVX2
    return "AVX2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "the baseline instruction set";
#endif
}
