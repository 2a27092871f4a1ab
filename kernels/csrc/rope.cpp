// From a fused projection to attention: heads of q and k normed and rotated, k and v written to the paged pool.
//
// One thread does a token; sums run over channels in vectors of W and over a vector's lanes pairwise, so a token's bits
// are its own.
#include <cmath>

#include "parallel.h"
#include "pool.h"

namespace fn {
namespace {

constexpr int MOST = 1024;  // channels of a head

struct Turn {
    const float *cos, *sin;  // of the token
    int C, half;
    float eps;
};

template <class T>
FN_INLINE vf read(const T* p, int n) {  // the first n elements, the rest zero
    return n >= W ? load_float(p) : load_float_part(p, n);
}

template <class T>
FN_INLINE void write(T* p, vf v, int n) {
    if (n >= W) return store_float(p, v);
    T part[W];
    store_float(part, v);
    memcpy(p, part, sizeof(T) * n);
}

FN_INLINE vf rounded(vf v) {  // to the element type and back
#if FN_ELEMENT == 1
    const vu u = (vu)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;  // as round_bf16, but left where it is
    return v == v ? (vf)r : (vf)splat(uint32_t(0x7fc00000));
#else
    if constexpr (sizeof(Element) == 4) return v;
    Element e[W];
    store_float(e, v);
    return load_float(e);
#endif
}

FN_INLINE float sum(vf v) {  // in the order of sum_lanes, and not through memory
#if FN_AVX512
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return sum_lanes(v);
#endif
}

FN_INLINE vf norm_scale(vf square, const Turn& t) { return splat(1.f / std::sqrt(sum(square) / float(t.C) + t.eps)); }

// out = rotate(norm(x) * weight), both steps in float, rounded after each; without a weight there is no norm.
void any_head(const Element* x, const Element* weight, const Turn& t, Element* out) {
    float a[MOST + W];
    vf square{};
    for (int c = 0; c < t.C; c += W) {
        const vf v = read(x + c, t.C - c);
        store(a + c, v);
        square = fma(v, v, square);
    }
    if (weight) {
        const vf scale = norm_scale(square, t);
        for (int c = 0; c < t.C; c += W) {
            const vf v = load<vf>(a + c) * scale * read(weight + c, t.C - c);
            write(a + c, rounded(v), t.C - c);
        }
    }
    for (int i = 0; i < t.half; i += W) {
        const int n = t.half - i;
        const vf cos = read(t.cos + i, n), sin = read(t.sin + i, n), low = read(a + i, n), high = read(a + t.half + i, n);
        write(out + i, low * cos - high * sin, n);
        write(out + t.half + i, high * cos + low * sin, n);
    }
    for (int c = 2 * t.half; c < t.C; c += W) write(out + c, read(a + c, t.C - c), t.C - c);
}

// The same, bit for bit, of a head of C channels that are all rotated, held in registers.
template <int C>
FN_INLINE void whole_head(const Element* x, const Element* weight, const Turn& t, Element* out) {
    constexpr int N = C / W;
    vf a[N], square{};
#pragma GCC unroll 32
    for (int i = 0; i < N; i++) {
        a[i] = load_float(x + i * W);
        square = fma(a[i], a[i], square);
    }
    if (weight) {
        const vf scale = norm_scale(square, t);
#pragma GCC unroll 32
        for (int i = 0; i < N; i++) a[i] = rounded(a[i] * scale * load_float(weight + i * W));
    }
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; i++) {
        const vf cos = load_float(t.cos + i * W), sin = load_float(t.sin + i * W), low = a[i], high = a[N / 2 + i];
        store_float(out + i * W, low * cos - high * sin);
        store_float(out + C / 2 + i * W, high * cos + low * sin);
    }
}

void head(const Element* x, const Element* weight, const Turn& t, Element* out) {
    if (t.C == 128 && t.half == 64) return whole_head<128>(x, weight, t, out);
    if (t.C == 64 && t.half == 32) return whole_head<64>(x, weight, t, out);
    any_head(x, weight, t, out);
}

using v8 = int8_t __attribute__((vector_size(W)));

// x / scale as bytes in `codes`, whole vectors of them; returns the scale: the largest |x| / 127, or 0.
float round_codes(const Element* x, int C, int8_t* codes) {
    vf largest{};
    for (int c = 0; c < C; c += W) {
        const vf v = read(x + c, C - c);
        largest = max(largest, max(v, -v));
    }
    const float most = max_lane(largest), inverse = most < LEAST ? 0 : 127.f / most;
    for (int c = 0; c < C; c += W) {
        const vf magic = splat(12582912.f);  // ties to even
        const vi code = (vi)(read(x + c, C - c) * splat(inverse) + magic) - (vi)magic;
        store(codes + c, __builtin_convertvector(code, v8));
    }
    return most < LEAST ? 0 : most / 127.f;
}

// A token goes to one line of every atom of K and to its own half of pairs of V. Other threads may be writing the
// neighbours, so nothing but the token's own bytes is stored.

void put_k(const Code* x, int C, Code* to) {
    int c = 0;
    for (; c + PER <= C; c += PER) memcpy(to + c * BLOCK, x + c, sizeof(Code) * PER);
    if (c < C) to[c * BLOCK] = x[c];  // what pads the last atom stays zero
}

void put_v(const Code* x, int C, Code* to, int half) {
    if constexpr (PER == 1) {
        memcpy(to, x, sizeof(Code) * C);
    } else {
        int c = 0;
#if FN_AVX512
        if constexpr (!ROUNDED)
            for (; c + W <= C; c += W)
                _mm512_mask_storeu_epi16(to + c * PER, 0x55555555u << half, (__m512i)(widen(load<vh>(x + c)) << (16 * half)));
#endif
        for (; c < C; c++) to[c * PER + half] = x[c];
    }
}

// Whether tokens that follow each other in a block are written together, whole lines at a time.
#if FN_AVX512_BF16 && FN_ELEMENT == 1 && !FN_KV8
#define FN_TOGETHER 1
constexpr bool TOGETHER = true;
static_assert(PAIRS && W == BLOCK);
#else
constexpr bool TOGETHER = false;
#endif
constexpr int FEW = 4;  // so many are still written one by one

#if FN_TOGETHER
// x: `count` rows of C channels, `stride` elements apart, of the tokens from place `at` of a block on; to: that block's
// head. Rows become lanes; a mask leaves the neighbours alone.
void put_k_together(const Element* x, int64_t stride, int count, int at, int C, Code* to) {
    const __mmask16 mask = ((1u << count) - 1) << at;
    int c = 0;
    for (; c + W * PER <= C; c += W * PER) {
        vu row[W];
        for (int i = 0; i < W; i++) row[i] = i >= at && i < at + count ? load<vu>(x + (i - at) * stride + c) : vu{};
        transpose(row);
        for (int i = 0; i < W; i++) _mm512_mask_storeu_epi32(to + (c + i * PER) * BLOCK, mask, (__m512i)row[i]);
    }
    for (; c < C; c += PER)
        for (int i = 0; i < count; i++)
            memcpy(to + c * BLOCK + (at + i) * PER, x + i * stride + c, sizeof(Code) * (C - c < PER ? C - c : PER));
}

// The same of V, where both tokens of a pair are there: their channels alternate.
void put_v_together(const Element* x, int64_t stride, int count, int at, int C, Code* to) {
    int i = 0;
    if (at % 2) put_v(x, C, to + at / 2 * PER * C, 1), i = 1;
    for (; i + 2 <= count; i += 2) {
        const Element *even = x + i * stride, *odd = even + stride;
        Code* pair = to + (at + i) / 2 * PER * C;
        int c = 0;
        for (; c + W <= C; c += W)
            store(pair + c * PER, widen(load<vh>(even + c)) | widen(load<vh>(odd + c)) << 16);
        for (; c < C; c++) pair[c * PER] = even[c], pair[c * PER + 1] = odd[c];
    }
    if (i < count) put_v(x + i * stride, C, to + (at + i) / 2 * PER * C, 0);
}
#endif

// Asks for the lines of a head's K and V that a token is going to be written to.
FN_INLINE void prefetch(const Code* k, const Code* v, int C) {
    for (int c = 0; c < C; c += PER) __builtin_prefetch(k + c * BLOCK, 1, 2);
    if (!v) return;
    for (int c = 0; c < C; c += 64 / PER / int(sizeof(Code))) __builtin_prefetch(v + c * PER, 1, 2);
}

}  // namespace
}  // namespace fn

// qkv: T rows, `stride` elements apart, of H + 2 K heads of C channels; cos, sin: [T, half]; norms [C] or null;
// token t goes to place slot[t] % BLOCK of block slot[t] / BLOCK of the pools (pool.h); q: [T, H, C]; eps as the bits of a
// double. Without a pool of V (null) qkv has no heads of V either: H + K.
// Returns 0, 1 when a slot lies outside of the pool (nothing is written for it), 2 when a head is too wide.
extern "C" int fn_rope_write(const void* qkv, const void* q_norm, const void* k_norm, const float* cos, const float* sin,
                             void* k_pool, void* v_pool, const int32_t* slot, void* q, int64_t stride, int64_t T,
                             int64_t H, int64_t K, int64_t C, int64_t half, int64_t slots, int64_t eps_bits,
                             int threads) {
    using namespace fn;
    double eps;
    memcpy(&eps, &eps_bits, sizeof eps);
    if (C > MOST) return 2;
    constexpr int64_t MANY = 16;  // tokens
    const int64_t chunk = T > 128 ? MANY : 8;  // tokens an item takes
    std::atomic<int> bad{0};
    const Layout pool{K, C};
    const auto* in = static_cast<const Element*>(qkv);
    const auto turn = [&](int64_t t) { return Turn{cos + t * half, sin + t * half, int(C), int(half), float(eps)}; };
    // Where a head of a token's block begins, and its first atoms from there.
    const auto k_head = [&](int64_t t, int64_t h) { return static_cast<Code*>(k_pool) + pool.k(slot[t] / BLOCK, h); };
    const auto v_head = [&](int64_t t, int64_t h) { return static_cast<Code*>(v_pool) + pool.v(slot[t] / BLOCK, h); };
    const bool values = v_pool != nullptr;
    const auto k_at = [&](int64_t t) { return HEAD + slot[t] % BLOCK * PER; };
    const auto v_at = [&](int64_t t) { return HEAD + slot[t] % BLOCK / PER * PER * C; };
    each((T + chunk - 1) / chunk, T * (H + 2 * K) * C > 1 << 16 ? threads : 1, [&](int64_t i) {
        const int64_t begin = i * chunk, end = begin + chunk < T ? begin + chunk : T, G = H / K;
        Element turned[MANY][MOST + W];
        for (int64_t first = begin, next; first < end; first = next) {
            next = first + 1;
            if (slot[first] < 0 || slot[first] >= slots) {
                bad = 1;
                continue;
            }
            // [first, next): tokens that follow each other in one block
            while (next < end && slot[next] == slot[next - 1] + 1 && slot[next] % BLOCK) next++;
            const int count = int(next - first);
            const bool together = TOGETHER && count > FEW;
            // Heads outside, tokens inside: these tokens are written to the same lines.
            for (int64_t h = 0; h < K; h++) {
                for (int64_t t = first; t < next; t++) {
                    if (!together) prefetch(k_head(t, h) + k_at(t), values ? v_head(t, h) + v_at(t) : nullptr, int(C));
                    for (int64_t g = h * G; g < (h + 1) * G; g++)
                        head(in + t * stride + g * C, static_cast<const Element*>(q_norm), turn(t),
                             static_cast<Element*>(q) + (t * H + g) * C);
                }
                for (int64_t t = first; t < next; t++)
                    head(in + t * stride + (H + h) * C, static_cast<const Element*>(k_norm), turn(t), turned[t - first]);
#if FN_TOGETHER
                if (together) {
                    const Element* v = in + first * stride + (H + K + h) * C;
                    put_k_together(turned[0], MOST + W, count, slot[first] % BLOCK, int(C), k_head(first, h));
                    if (values) put_v_together(v, stride, count, slot[first] % BLOCK, int(C), v_head(first, h));
                    continue;
                }
#endif
                for (int64_t t = first; t < next; t++) {
                    const Element* k = turned[t - first];
                    Code* k_to = k_head(t, h);
                    if (!values) {
                        if constexpr (!ROUNDED) put_k((const Code*)k, int(C), k_to + k_at(t));
                        continue;
                    }
                    const Element* v = in + t * stride + (H + K + h) * C;
                    Code* v_to = v_head(t, h);
                    if constexpr (ROUNDED) {
                        int8_t codes[MOST + W];
                        ((float*)k_to)[slot[t] % BLOCK] = round_codes(k, int(C), codes);
                        put_k((const Code*)codes, int(C), k_to + k_at(t));
                        ((float*)v_to)[slot[t] % BLOCK] = round_codes(v, int(C), codes);
                        put_v((const Code*)codes, int(C), v_to + v_at(t), slot[t] % PER);
                    } else {
                        put_k((const Code*)k, int(C), k_to + k_at(t));
                        put_v((const Code*)v, int(C), v_to + v_at(t), slot[t] % PER);
                    }
                }
            }
        }
    });
    return bad;
}
