// One vector of W floats, as wide as the machine's registers, and the few operations the kernels need.
//
// Multiply-add is always spelled out (the files are compiled with -ffp-contract=off): whether a product is rounded
// before it is added must not depend on how the compiler happened to inline a loop, or two paths to the same row
// would differ in their last bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fn {

using vf = float __attribute__((vector_size(W * 4)));
using vi = int32_t __attribute__((vector_size(W * 4)));
using vu = uint32_t __attribute__((vector_size(W * 4)));
using vh = uint16_t __attribute__((vector_size(W * 2)));
using vl = uint64_t __attribute__((vector_size(W * 4)));  // W / 2 lanes

#define FN_INLINE inline __attribute__((always_inline))

template <class V>
FN_INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
FN_INLINE void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}
FN_INLINE vf splat(float x) { return x - vf{}; }
FN_INLINE vi splat(int32_t x) { return x - vi{}; }
FN_INLINE vu splat(uint32_t x) { return x - vu{}; }
FN_INLINE vi lanes() {  // 0, 1, ... W-1
    vi v;
    for (int i = 0; i < W; i++) v[i] = i;
    return v;
}

FN_INLINE vf fma(vf a, vf b, vf c) {
#if FN_AVX512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FN_AVX2
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
FN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FN_INLINE float max_lane(vf v) {
    float m = v[0];
#if FN_AVX512
    m = _mm512_reduce_max_ps((__m512)v);
#else
    for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
#endif
    return m;
}
FN_INLINE float sum_lanes(vf v) {
    float a[W];
    store(a, v);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}
FN_INLINE bool any(vi mask) {
#if FN_AVX512
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif FN_AVX2
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t r = 0;
    for (int i = 0; i < W; i++) r |= mask[i];
    return r != 0;
#endif
}

// e^x for x <= 0, within 2 ulp; exactly 1 at 0 and exactly 0 below -87 (so also at -infinity).
// x = n ln 2 + r, |r| <= ln 2 / 2. Source: Cephes expf (Moshier).
FN_INLINE vf exp_negative(vf x) {
    const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    vf low = splat(-87.f);
    vf y = max(x, low);
    vf shifted = fma(y, splat(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = fma(n, splat(-0.693359375f), y);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.f);
    vi power = ((vi)shifted - (vi)magic) << 23;
    vf e = (vf)((vi)p + power);
    return x < low ? vf{} : e;
}

// Storage types. Each loads as float and stores rounded to nearest even.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// A library serves one type of element (-DFN_ELEMENT): one build is a third of the work of three.
#if FN_ELEMENT == 1
using Element = bf16;
#elif FN_ELEMENT == 2
using Element = f16;
#else
using Element = float;
#endif

// Whether two elements make one "atom" of 32 bits, which one instruction multiplies and adds.
#if FN_AVX512_BF16 && FN_ELEMENT == 1
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

FN_INLINE vf load_float(const float* p) { return load<vf>(p); }
FN_INLINE vu widen(vh h) {  // GCC splits the conversion of a whole register into halves, hence the intrinsics
#if FN_AVX512
    return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif FN_AVX2
    return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, vu);
#endif
}
FN_INLINE vh narrow(vu u) {
#if FN_AVX512
    return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#else
    return __builtin_convertvector(u, vh);
#endif
}
FN_INLINE vf load_float(const bf16* p) { return (vf)(widen(load<vh>(p)) << 16); }
FN_INLINE void store_float(float* p, vf v) { store(p, v); }
FN_INLINE vh round_bf16(vf v) {
    vu u = (vu)v;
    vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    r = (vu)(v == v ? (vi)r : (vi)splat(uint32_t(0x7fc0)));
    return narrow(r);
}
FN_INLINE void store_float(bf16* p, vf v) { store(p, round_bf16(v)); }

#if FN_AVX512
FN_INLINE vf load_float(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FN_INLINE void store_float(f16* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif FN_AVX2 && defined(__F16C__)
FN_INLINE vf load_float(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FN_INLINE void store_float(f16* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FN_INLINE float half_to_float(uint16_t h) {
    // exponent and mantissa moved into place, then the bias corrected by a multiplication, which also mends subnormals
    uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    memcpy(&magnitude, &f, 4);
    if ((h & 0x7c00) == 0x7c00) magnitude = 0x7f800000u | (uint32_t(h & 0x3ff) << 13);
    magnitude |= sign;
    memcpy(&f, &magnitude, 4);
    return f;
}
FN_INLINE uint16_t float_to_half(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t sign = uint16_t((u >> 16) & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
    if (u < 0x38800000) {                                 // subnormal: let the adder round at 2^-24
        float a;
        memcpy(&a, &u, 4);
        a += 0.5f;
        memcpy(&u, &a, 4);
        return uint16_t(sign | (u - 0x3f000000));
    }
    u += 0xfff + ((u >> 13) & 1);
    return uint16_t(sign | ((u - 0x38000000) >> 13));
}
FN_INLINE vf load_float(const f16* p) {
    vf v;
    for (int i = 0; i < W; i++) v[i] = half_to_float(p[i].bits);
    return v;
}
FN_INLINE void store_float(f16* p, vf v) {
    for (int i = 0; i < W; i++) p[i].bits = float_to_half(v[i]);
}
#endif

// The first n < W elements, the rest zero.
template <class T>
FN_INLINE vf load_float_part(const T* p, int n) {
    T a[W] = {};
    memcpy(a, p, sizeof(T) * n);
    return load_float(a);
}

// ---- integers of 16 bits, whose products sum exactly --------------------------------------------------------------------

using vs = int16_t __attribute__((vector_size(W * 4)));  // 2 W lanes
using vb = int8_t __attribute__((vector_size(W * 2)));

// sum + the dot product of two channels, for W columns.
FN_INLINE vi madd16(vi sum, int32_t x, vs w) {
#if FN_AVX512 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif FN_AVX512
    return sum + (vi)_mm512_madd_epi16(_mm512_set1_epi32(x), (__m512i)w);
#elif FN_AVX2
    return sum + (vi)_mm256_madd_epi16(_mm256_set1_epi32(x), (__m256i)w);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16(_mm_set1_epi32(x), (__m128i)w);
#else
    return sum + ((vi)w << 16 >> 16) * int32_t(int16_t(x)) + ((vi)w >> 16) * (x >> 16);
#endif
}

FN_INLINE vs widen8(const int8_t* p) {
#if FN_AVX512
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif FN_AVX2
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(load<vb>(p), vs);
#endif
}

// Rows become columns, in place: log2(W) rounds of pairwise interleaving.
FN_INLINE void transpose(vu (&a)[W]) {
#pragma GCC unroll 8
    for (int round = 1; round < W; round *= 2) {
        vu b[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
#if FN_AVX512
            b[2 * i] = __builtin_shufflevector(a[i], a[i + W / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + W / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                                   30, 15, 31);
#elif FN_AVX2
            b[2 * i] = __builtin_shufflevector(a[i], a[i + W / 2], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + W / 2], 4, 12, 5, 13, 6, 14, 7, 15);
#else
            b[2 * i] = __builtin_shufflevector(a[i], a[i + W / 2], 0, 4, 1, 5);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + W / 2], 2, 6, 3, 7);
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) a[i] = b[i];
    }
}

}  // namespace fn
