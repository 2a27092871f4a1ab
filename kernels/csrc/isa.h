// Which of the instructions that the kernels know this build may use, and how many floats a register holds.
#pragma once

namespace fn {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FN_AVX512 1
#if defined(__AVX512BF16__)
#define FN_AVX512_BF16 1
#endif
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define FN_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

}  // namespace fn
