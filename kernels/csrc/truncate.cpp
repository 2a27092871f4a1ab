// Where a row's ranking is cut (min_p, top_k, top_p). Follows kernels/truncation.py: weights are integers, so sums have no
// order and every backend finds the same token.
//
// Nothing is sorted. What may hold the cut is copied out of the row, and narrowed by histograms over the bits of floats:
// at most four levels, whatever the distribution.
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace fn {
namespace {

constexpr int GROUP = 16;      // vectors of which the largest value in each lane is kept
constexpr float NEAR = -8.f;   // (x - max) / T of tokens that hold most of the mass, unless the distribution is flat

float log32(float x) {  // philox.log32
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t half = (bits & 0x007FFFFF) | 0x3F000000;
    float m;
    memcpy(&m, &half, 4);
    const bool small = m < 0.70710678118654752f;
    const float e = float(int32_t(bits >> 23) - 126 - small), f = (small ? m + m : m) - 1.f, z = f * f;
    const float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    float y = 7.0376836292e-2f;
    for (float c : coefficients) y = y * f + c;
    y = y * f * z;
    y = y + e * -2.12194440e-4f;
    y = y - z * 0.5f;
    return (f + y) + e * 0.693359375f;
}

// What the weights of a row depend on.
struct Row {
    float top, T;
};

FN_INLINE vf below_top(vf x, const Row& row) {  // (x - max) / T
    return x == splat(row.top) ? vf{} : (x - splat(row.top)) / splat(row.T);
}

FN_INLINE vf exp32(vf y) {  // truncation.exp32: no multiply-add
    const vf magic = splat(12582912.f);
    y = max(y, splat(-30.f));
    vf shifted = y * splat(1.44269504088896341f) + magic;
    vf n = shifted - magic;
    vf r = y - n * splat(0.693359375f);
    r = r + n * splat(2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    vf e = (p * (r * r) + r) + splat(1.f);
    return (vf)((vi)e + (((vi)shifted - (vi)magic) << 23));
}

struct Weights {
    vl low, high;
};

FN_INLINE Weights scaled(vf e) {  // whole part of e * 2^40, for 0 and 2^-44 < e <= 1
    Weights w;
#if FN_AVX512
    const __m512 s = (__m512)(e * splat(0x1p40f));
    w.low = (vl)_mm512_cvttps_epi64(_mm512_castps512_ps256(s));
    w.high = (vl)_mm512_cvttps_epi64(_mm512_extractf32x8_ps(s, 1));
#else
    const vu bits = (vu)e;
    for (int i = 0; i < W / 2; i++) {
        const uint32_t a = bits[i], b = bits[i + W / 2];
        w.low[i] = a ? (uint64_t((a & 0x7FFFFF) | 0x800000) << 17) >> (127 - (a >> 23)) : 0;
        w.high[i] = b ? (uint64_t((b & 0x7FFFFF) | 0x800000) << 17) >> (127 - (b >> 23)) : 0;
    }
#endif
    return w;
}

FN_INLINE int count(vi mask) {
#if FN_AVX512
    return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
#else
    int n = 0;
    for (int i = 0; i < W; i++) n -= mask[i];
    return n;
#endif
}

FN_INLINE uint64_t sum(vl v) {
    uint64_t s = 0;
    for (int i = 0; i < W / 2; i++) s += v[i];
    return s;
}

uint64_t weight(float x, const Row& row) { return scaled(exp32(below_top(splat(x), row))).low[0]; }

// x of `mask` to out; gives how many. Up to W floats beyond them are written.
FN_INLINE int append(float* out, vf x, vi mask) {
#if FN_AVX512
    const __mmask16 m = _mm512_movepi32_mask((__m512i)mask);
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, (__m512)x));
    return __builtin_popcount(m);
#else
    int n = 0;
    for (int i = 0; i < W; i++) out[n] = x[i], n -= mask[i];
    return n;
#endif
}

// The floats x[0:n], the last vector filled up with -infinity; body(vector, mask of those that there are).
template <class Body>
FN_INLINE void sweep(const float* x, int32_t n, const Body& body) {
    int32_t i = 0;
    for (; i + W <= n; i += W) body(load<vf>(x + i), splat(-1));
    if (i < n) {
        float a[W];
        for (int j = 0; j < W; j++) a[j] = i + j < n ? x[i + j] : -INFINITY;
        body(load<vf>(a), (vi)(lanes() < splat(n - i)));
    }
}

FN_INLINE vu key(vf x) {  // a larger float has a larger key, and -0 is 0
    const vi bits = (vi)(x + vf{});
    return (vu)(bits ^ ((bits >> 31) | splat(INT32_MIN)));
}

struct Cut {
    float value;
    uint64_t above;  // measure of the tokens that are larger
};

// The largest value v such that the measure of tokens >= v reaches `goal`: their number, or their weights. x is used up.
template <bool WEIGHED>
Cut descend(float* x, int32_t n, uint64_t goal, const Row& row) {
    constexpr int COPIES = 4;  // additions to one place wait for each other
    static thread_local uint64_t table[COPIES << 10];
    for (uint64_t above = 0;;) {
        vu least = splat(~0u), most = {};
        sweep(x, n, [&](vf v, vi there) {
            const vu k = key(v);
            most = there & (k > most) ? k : most;
            least = there & (k < least) ? k : least;
        });
        uint32_t high = most[0], low = least[0];
        for (int i = 1; i < W; i++) high = most[i] > high ? most[i] : high, low = least[i] < low ? least[i] : low;
        if (high == low) return {x[0], above};
        const int bits = n < 4096 ? 8 : 10, span = 32 - __builtin_clz(high - low);
        const int shift = span > bits ? span - bits : 0;
        memset(table, 0, sizeof(uint64_t) * COPIES << bits);
        sweep(x, n, [&](vf v, vi there) {
            uint32_t at[W];
            store(at, (splat(high) - key(v)) >> shift);
            uint64_t w[W];
            if (WEIGHED) {
                const Weights both = scaled(exp32(below_top(v, row)));
                store(w, both.low), store(w + W / 2, both.high);
            }
            const int end = count(there);
            for (int i = 0; i < end; i++) table[(i % COPIES << bits) + at[i]] += WEIGHED ? w[i] : 1;
        });
        uint32_t b = 0;
        for (;; b++) {
            uint64_t here = 0;
            for (int c = 0; c < COPIES; c++) here += table[(c << bits) + b];
            if (above + here >= goal || b == (high - low) >> shift) break;
            above += here;
        }
        int32_t kept = 0;
        sweep(x, n, [&](vf v, vi there) {  // in place: never more is written than was read, but for the vector itself
            const vi in = there & (vi)((splat(high) - key(v)) >> shift == splat(b));
            if (any(in)) {
                alignas(64) float a[2 * W];
                const int c = append(a, v, in);
                memcpy(x + kept, a, sizeof(float) * c);
                kept += c;
            }
        });
        n = kept;
    }
}

// Token `ties` of those that equal value, in order of ids; the last of them if there are fewer.
int32_t place(const float* x, int32_t V, float value, uint64_t ties) {
    int32_t last = -1;
    for (int32_t i = 0; i < V && ties; i += W) {
        if (i + W <= V && !any((vi)(load<vf>(x + i) == splat(value)))) continue;
        for (int32_t j = i; j < V && j < i + W && ties; j++)
            if (x[j] == value) last = j, ties--;
    }
    return last;
}

int32_t last_kept(const float* x, int32_t V, float T, float min_p, int32_t k, float top_p) {
    const bool by_k = 0 < k && k < V, by_mass = top_p < 1;
    if (!(T > 0) || !(min_p > 0 || by_k || by_mass)) return -1;
    static thread_local Scratch memory;
    const size_t room = line((V + 2 * W) * sizeof(float));
    char* start = memory.reserve(2 * room);
    float *found = reinterpret_cast<float*>(start), *work = reinterpret_cast<float*>(start + room);

    int32_t peaks = 0, in_group = 0;
    vf peak = splat(-INFINITY), top = peak;
    sweep(x, V, [&](vf v, vi) {
        peak = max(v, peak);
        if (++in_group == GROUP) {
            store(work + peaks, peak);
            top = max(peak, top), peak = splat(-INFINITY), peaks += W, in_group = 0;
        }
    });
    const Row row{max_lane(max(peak, top)), T};
    if (row.top == -INFINITY) return -1;
    float least = -INFINITY;
    if (min_p > 0) least = row.top + T * log32(min_p > 0x1p-126f ? min_p : 0x1p-126f);

    uint64_t ties = UINT64_MAX;
    float value = least;
    int32_t n = 0;
    uint64_t total = 0;
    if (by_k || !by_mass) {
        // Each peak is a token of its own, so the k-th of them is no larger than the k-th token.
        if (by_k && k <= peaks) {
            const float pivot = descend<false>(work, peaks, k, row).value;
            least = pivot > least ? pivot : least;
        }
        sweep(x, V, [&](vf v, vi there) {
            const vi in = there & (vi)(v >= splat(least));
            if (any(in)) n += append(found + n, v, in);
        });
        if (by_k && k < n) {
            memcpy(work, found, sizeof(float) * n);
            const Cut cut = descend<false>(work, n, k, row);
            value = cut.value, ties = k - cut.above;
        } else {
            vf smallest = splat(INFINITY);
            sweep(found, n, [&](vf v, vi there) { smallest = there & (vi)(v < smallest) ? v : smallest; });
            value = -max_lane(-smallest);
        }
    }
    if (by_mass) {
        uint64_t near = 0;
        if (by_k) {
            vl s = {};
            uint64_t equal = 0;
            int32_t kept = 0;
            sweep(found, n, [&](vf v, vi there) {
                const vi larger = there & (vi)(v > splat(value)), same = there & (vi)(v == splat(value));
                const vf e = exp32(below_top(v, row));
                const Weights w = scaled(larger ? e : vf{});
                s += w.low + w.high;
                equal += count(same);
                kept += append(work + kept, v, larger | same);
            });
            n = kept;
            total = sum(s) + (equal < ties ? equal : ties) * weight(value, row);
            near = total;
        } else {
            float far = row.top - 29.f * T - fabsf(row.top) * 1e-6f;  // from (x - max) / T = -28 on weights are 0
            far = far <= row.top ? far : row.top;                     // both infinite
            const float floor = least > far ? least : far;
            vl s = {}, nearby = {};
            sweep(x, V, [&](vf v, vi there) {
                const vi in = there & (vi)(v >= splat(floor));
                if (!any(in)) return;
                const vf y = below_top(v, row), e = exp32(y);
                Weights w = scaled(in ? e : vf{});
                s += w.low + w.high;
                const vi close = in & (vi)(y > splat(NEAR));
                if (!any(close)) return;
                w = scaled(close ? e : vf{});
                nearby += w.low + w.high;
                n += append(work + n, v, close);
            });
            total = sum(s), near = sum(nearby);
        }
        const double share = double(top_p) * double(total);
        uint64_t goal = uint64_t(share);
        goal += double(goal) < share;
        goal = goal ? goal : 1;
        if (near < goal) {
            n = 0, goal -= near;
            sweep(x, V, [&](vf v, vi there) {
                const vi in = there & (vi)(v >= splat(least)) & (vi)(below_top(v, row) <= splat(NEAR));
                if (any(in)) n += append(work + n, v, in);
            });
        }
        const Cut cut = descend<true>(work, n, goal, row);
        const uint64_t each = weight(cut.value, row);
        value = cut.value, ties = each ? (goal - cut.above + each - 1) / each : UINT64_MAX;
    }
    return place(x, V, value, ties);
}

}  // namespace
}  // namespace fn

extern "C" void fn_truncate(const float* logits, const float* temperature, const float* min_p, const int32_t* top_k,
                            const float* top_p, int32_t* last, int64_t R, int64_t V, int64_t stride, int threads) {
    fn::each(R, threads, [&](int64_t r) {
        last[r] = fn::last_kept(logits + r * stride, int32_t(V), temperature[r], min_p[r], top_k[r], top_p[r]);
    });
}

// Logits where the bit of a token is 1, elsewhere -infinity.
extern "C" void fn_apply_mask(const float* logits, const int32_t* mask, float* out, int64_t R, int64_t V, int64_t stride,
                              int64_t words, int threads) {
    using namespace fn;
    each(R, threads, [&](int64_t r) {
        const float* x = logits + r * stride;
        float* y = out + r * V;
        for (int64_t w = 0; 32 * w < V; w++) {
            const uint32_t bits = uint32_t(mask[r * words + w]);
            const int64_t end = V - 32 * w < 32 ? V - 32 * w : 32;
            if (end == 32 && (bits == 0 || bits == UINT32_MAX)) {  // most words of most masks
                if (bits)
                    memcpy(y + 32 * w, x + 32 * w, 32 * sizeof(float));
                else
                    for (int64_t j = 0; j < 32; j++) y[32 * w + j] = -INFINITY;
                continue;
            }
            for (int64_t j = 0; j < end; j++) y[32 * w + j] = bits >> j & 1 ? x[32 * w + j] : -INFINITY;
        }
    });
}
