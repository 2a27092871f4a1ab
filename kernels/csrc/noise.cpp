// Choosing a token with counter-based Gumbel noise. Follows kernels/philox.py step by step in float32, so its tokens
// equal the reference's; only work that cannot change the winner is skipped.
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace fn {
namespace {

constexpr float LARGEST_NOISE = 16.6356f;  // above -log(-log(1 - 2^-24)) = 16.63553

FN_INLINE vl multiply_low(vl a, uint32_t b) {  // low words of a's lanes times b, 64 bits each
#if FN_AVX512
    return (vl)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif FN_AVX2
    return (vl)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (vl)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffull) * (uint64_t)b;
#endif
}

struct Keys {
    uint32_t k0[10], k1[10];
    explicit Keys(uint64_t seed) {
        uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
        for (int i = 0; i < 10; i++, a += 0x9E3779B9u, b += 0xBB67AE85u) k0[i] = a, k1[i] = b;
    }
};

FN_INLINE vl xor3(vl a, vl b, vl c) {
#if FN_AVX512
    return (vl)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

// First word of Philox4x32-10 of (id, position, stream, 0) in the low halves of W / 2 lanes.
// High halves hold rubbish on the way: the multiplication reads low halves only. In the first two rounds only one of
// the two products depends on the id.
FN_INLINE vl first_word(vl id, uint32_t position, uint32_t stream, const Keys& key) {
    constexpr uint32_t MUL0 = 0xD2511F53u, MUL1 = 0xCD9E8D57u;
    const vl zero = {};
    const uint64_t s1 = uint64_t(stream) * MUL1;
    const uint64_t s0 = uint64_t(uint32_t(s1 >> 32) ^ position ^ key.k0[0]) * MUL0;
    vl p0 = multiply_low(id, MUL0);
    vl p1 = multiply_low((p0 >> 32) ^ uint64_t(key.k1[0]), MUL1);
    vl c0 = (p1 >> 32) ^ uint64_t(uint32_t(s1) ^ key.k0[1]);
    vl c1 = p1;
    vl c2 = p0 ^ uint64_t(uint32_t(s0 >> 32) ^ key.k1[1]);
    vl c3 = zero + uint64_t(uint32_t(s0));
#pragma GCC unroll 8
    for (int i = 2; i < 10; i++) {
        p0 = multiply_low(c0, MUL0), p1 = multiply_low(c2, MUL1);
        c0 = xor3(p1 >> 32, c1, zero + uint64_t(key.k0[i]));
        c1 = p1;
        c2 = xor3(p0 >> 32, c3, zero + uint64_t(key.k1[i]));
        c3 = p0;
    }
    return c0;
}

FN_INLINE vf log32(vf x) {
    vi bits = (vi)x;
    vf m = (vf)((bits & 0x007FFFFF) | 0x3F000000);
    vi small = m < splat(0.70710678118654752f);
    vf e = __builtin_convertvector((bits >> 23) - 126 + small, vf);  // true lanes are -1
    vf f = (small ? m + m : m) - splat(1.f);
    vf z = f * f;
    vf y = splat(7.0376836292e-2f);
    y = y * f + splat(-1.1514610310e-1f);
    y = y * f + splat(1.1676998740e-1f);
    y = y * f + splat(-1.2420140846e-1f);
    y = y * f + splat(1.4249322787e-1f);
    y = y * f + splat(-1.6668057665e-1f);
    y = y * f + splat(2.0000714765e-1f);
    y = y * f + splat(-2.4999993993e-1f);
    y = y * f + splat(3.3333331174e-1f);
    y = y * f * z;
    y = y + e * splat(-2.12194440e-4f);
    y = y - z * splat(0.5f);
    return (f + y) + e * splat(0.693359375f);
}

// Uniforms in (0, 1) of tokens id, id + 1, ... id + W - 1.
FN_INLINE vf uniform(int32_t id, uint32_t position, uint32_t stream, const Keys& key) {
    vl first = {};
    for (int i = 0; i < W / 2; i++) first[i] = uint64_t(i);
    vl low = first_word(first + uint64_t(uint32_t(id)), position, stream, key);
    vl high = first_word(first + uint64_t(uint32_t(id)) + uint64_t(W / 2), position, stream, key);
    vu word;
#if FN_AVX512
    word = (vu)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32((__m512i)low)),
                                  _mm512_cvtepi64_epi32((__m512i)high), 1);
#else
    for (int i = 0; i < W / 2; i++) word[i] = uint32_t(low[i]), word[i + W / 2] = uint32_t(high[i]);
#endif
    return (__builtin_convertvector((vi)(word >> 9), vf) + splat(0.5f)) * splat(0x1p-23f);
}

FN_INLINE vf gumbel(vf u) { return -log32(-log32(u)); }

// No less than gumbel(u), without a logarithm: -log u >= 1 - u >= 2^e, so the noise is at most -e ln 2, where e is the
// exponent of 1 - u (which is exact); a little more, for the rounding of the noise.
FN_INLINE vf noise_limit(vf u) {
    vi e = (vi)(splat(1.f) - u) >> 23;
    return __builtin_convertvector(127 - e, vf) * splat(0.69315f) + splat(1e-4f);
}

struct Best {
    float value = -INFINITY;
    int32_t id = 0;
};

// What truncation left of a row: the tokens above `least`, and those that equal it up to id `last`.
struct Kept {
    float least;
    int32_t last;  // -1: every token
    FN_INLINE vf only(vf x, int32_t id) const {
        return (x > splat(least)) | ((x == splat(least)) & (lanes() <= splat(last - id))) ? x : splat(-INFINITY);
    }
};

// Best of ids [from, to) of a row. `bound` is a value that some token of the row is known to reach.
Best best_of(const float* logit, int32_t from, int32_t to, const Kept& kept, float T, uint32_t position,
             uint32_t stream, const Keys& key, std::atomic<float>& bound) {
    vf best = splat(-INFINITY);
    vi best_id = {};
    const bool warm = T > 0;
    const vf divisor = splat(warm ? T : 1.f);
    if (warm) {  // the noise of the largest logit gives a first bound, which spares most tokens their noise
        vf top = splat(-INFINITY);
        vi top_id = {};
        for (int32_t i = from; i + W <= to; i += W) {
            vf x = load<vf>(logit + i);
            vi more = x > top;
            top = more ? x : top;
            top_id = more ? splat(i) : top_id;
        }
        int lane = 0;
        for (int j = 1; j < W; j++) lane = top[j] > top[lane] ? j : lane;
        if (to - from >= W && top[lane] > -INFINITY) {
            vf x = load<vf>(logit + top_id[lane]);
            if (kept.last >= 0) x = kept.only(x, top_id[lane]);
            vf value = x / divisor + gumbel(uniform(top_id[lane], position, stream, key));
            float reached = max_lane(value);
            if (reached > bound.load(std::memory_order_relaxed)) bound.store(reached, std::memory_order_relaxed);
        }
    }
    float least = bound.load(std::memory_order_relaxed);
    for (int32_t i = from; i < to; i += W) {
        vf x;
        if (i + W <= to) {
            x = load<vf>(logit + i);
        } else {
            float a[W];
            for (int j = 0; j < W; j++) a[j] = i + j < to ? logit[i + j] : -INFINITY;
            x = load<vf>(a);
        }
        if (kept.last >= 0) {
            if (!any((vi)(x >= splat(kept.least)))) continue;
            x = kept.only(x, i);
        }
        if (warm) {
            x = x / divisor;
            if (!any(x + splat(LARGEST_NOISE) >= splat(least))) continue;
            const vf u = uniform(i, position, stream, key);
            if (!any(x + noise_limit(u) >= splat(least))) continue;
            x = x + gumbel(u);
            if (any(x > splat(least))) least = max_lane(x);
        }
        vi more = x > best;
        best = more ? x : best;
        best_id = more ? splat(i) : best_id;
    }
    if (warm && least > bound.load(std::memory_order_relaxed)) bound.store(least, std::memory_order_relaxed);
    best_id = best_id + lanes();
    Best b;
    for (int j = 0; j < W; j++)
        if (best[j] > b.value || (best[j] == b.value && best[j] > -INFINITY && best_id[j] < b.id))
            b = {best[j], best_id[j]};
    return b;
}

}  // namespace
}  // namespace fn

extern "C" void fn_gumbel_argmax(const float* logits, const float* temperature, const int64_t* seed,
                                 const int32_t* position, const int32_t* last, int32_t* token, int64_t R, int64_t V,
                                 int64_t stride, int64_t stream, int threads) {
    using namespace fn;
    constexpr int64_t CHUNK = 16384;  // tokens an item looks at: 64 KiB, read twice, the second time from cache
    const int64_t chunks = (V + CHUNK - 1) / CHUNK;
    Best* found = new Best[R * chunks];
    std::atomic<float>* bound = new std::atomic<float>[R];
    for (int64_t r = 0; r < R; r++) bound[r] = -INFINITY;
    each(R * chunks, R * V > 8192 ? threads : 1, [&](int64_t i) {
        const int64_t r = i / chunks, c = i % chunks;
        const int64_t end = (c + 1) * CHUNK < V ? (c + 1) * CHUNK : V;
        const float* row = logits + r * stride;
        const int32_t cut = last ? last[r] : -1;
        const Kept kept{cut < 0 ? -INFINITY : row[cut], cut};
        found[i] = best_of(row, int32_t(c * CHUNK), int32_t(end), kept, temperature[r], uint32_t(position[r]),
                           uint32_t(stream), Keys(uint64_t(seed[r])), bound[r]);
    });
    for (int64_t r = 0; r < R; r++) {
        Best b;
        for (int64_t c = 0; c < chunks; c++)  // in order of ids, so that the lowest wins a tie
            if (found[r * chunks + c].value > b.value) b = found[r * chunks + c];
        token[r] = b.id;
    }
    delete[] found;
    delete[] bound;
}
