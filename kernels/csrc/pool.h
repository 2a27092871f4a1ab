// How the KV of a layer lies in its two pools, so that attention multiplies it as it is (`kernels/pool.py` says it, too).
//
//     K  [N, K, ceil(C / PER), BLOCK, PER]    tokens in lanes
//     V  [N, K, BLOCK / PER, C, PER]          channels in lanes
//
// in "atoms" of PER elements, which one instruction multiplies and adds: two of bfloat16 with AVX512-BF16 (channels of K,
// tokens of V), else one, made a float as it is loaded.
//
// With FN_KV8 elements are rounded to int8, two to an atom, and a head of a block begins with BLOCK floats, the scales of
// its tokens: [N, K, bytes].
#pragma once
#include <cstdint>

#include "simd.h"

namespace fn {
namespace {

constexpr int BLOCK = 16;           // tokens
#if FN_KV8
constexpr bool ROUNDED = true;
using Code = int8_t;
#else
constexpr bool ROUNDED = false;
using Code = Element;
#endif
constexpr int PER = PAIRS || ROUNDED ? 2 : 1;                    // elements of an atom
constexpr int HEAD = ROUNDED ? BLOCK * int(sizeof(float)) : 0;  // codes' room that scales take
constexpr float LEAST = 1e-30f;                                 // what is smaller counts as zero where values are rounded

struct Layout {  // of one layer: K heads of C channels
    int64_t K, C;

    FN_INLINE int64_t atoms() const { return (C + PER - 1) / PER; }
    // Where a head of a block begins.
    FN_INLINE int64_t k(int64_t block, int64_t head) const { return (block * K + head) * (HEAD + atoms() * BLOCK * PER); }
    FN_INLINE int64_t v(int64_t block, int64_t head) const { return (block * K + head) * (HEAD + BLOCK * C); }
};

}  // namespace
}  // namespace fn
