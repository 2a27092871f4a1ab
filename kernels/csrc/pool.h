// How the KV of a layer lies in its two pools, so that attention multiplies it as it is (`kernels/pool.py` says it, too).
//
//     K  [N, K, ceil(C / PER), BLOCK, PER]    tokens in lanes
//     V  [N, K, BLOCK / PER, C, PER]          channels in lanes
//
// in "atoms" of PER elements, which one instruction multiplies and adds: two of bfloat16 with AVX512-BF16 (channels of K,
// tokens of V), else one, made a float as it is loaded.
#pragma once
#include <cstdint>

#include "simd.h"

namespace fn {
namespace {

constexpr int BLOCK = 16;           // tokens
constexpr int PER = PAIRS ? 2 : 1;  // elements of an atom

struct Layout {  // of one layer: K heads of C channels
    int64_t K, C;

    FN_INLINE int64_t atoms() const { return (C + PER - 1) / PER; }
    // Where a head of a block begins.
    FN_INLINE int64_t k(int64_t block, int64_t head) const { return (block * K + head) * atoms() * BLOCK * PER; }
    FN_INLINE int64_t v(int64_t block, int64_t head) const { return (block * K + head) * BLOCK * C; }
};

}  // namespace
}  // namespace fn
