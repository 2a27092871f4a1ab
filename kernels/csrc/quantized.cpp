// y = x w^T + bias with the weight as codes of 8 or 4 bits, decoded in registers; and the codes from a weight.
//
// Codes lie in panels of PANEL rows of the weight, as in linear.cpp, and every group of a column's channels has a scale.
// A row of x enters as integers with a scale for each of the same groups, so a group's sum is one of integers: exact,
// hence the same in any order and on every processor. Groups are scaled and added as floats from 0 up.
//
// The integers have 16 bits or 8. Sixteen against the group's largest value cost less than bfloat16's own eight; pairs of
// them are multiplied and added by one instruction everywhere (AVX512-VNNI, else madd). Eight ("dynamic" quantization) do
// twice as much an instruction where there is VNNI, and round the row more than bfloat16 does.
//
//   8 bits: [panels, K / 8, 2, 32 columns, 4 channels], the integer + 128.
//   4 bits: [panels, K / 8, 32 columns, 4 bytes]: the lower half of byte 2p + h is the code of channel 4h + p, the upper
//           half that of channel 4h + p + 2, an index into CODES.
//
// What one instruction multiplies is what a shift or a mask leaves of such a lane, so the channels of x are put in that
// order, eight by eight (`ORDER`), when they become integers. A bias of the codes is taken off a group's sum at its
// beginning: it is the bias times the sum of the row's integers.
#include <type_traits>

#include "product.h"

namespace fn {
namespace {

constexpr int MR = W == 4 ? 6 : W == 8 ? 4 : 12;  // rows done together
constexpr int DEEP = 8;                           // K is rounded up to this

// What the 16 codes stand for, times the scale: closer together where weights are many. Source: IQ4_NL of llama.cpp.
alignas(64) constexpr int16_t CODES[32] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
                                           -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(64) [[maybe_unused]] constexpr uint8_t CODES_UP[32] = {  // + 127, as bytes
    0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240,
    0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240};

template <int BITS>
constexpr int GROUP = BITS == 8 ? 128 : 32;  // channels that share a scale

// Codes as they are multiplied by integers kept in S bits: what was added to them, and in which order eight channels go.
template <int BITS, int S>
constexpr int BIAS = BITS == 8 ? 128 : S == 8 ? 127 : 0;
template <int BITS, int S>
constexpr int ORDER[8] = {0, 1, 2, 3, 4, 5, 6, 7};
template <>
constexpr int ORDER<8, 16>[8] = {0, 2, 1, 3, 4, 6, 5, 7};
template <>
constexpr int ORDER<4, 8>[8] = {0, 4, 1, 5, 2, 6, 3, 7};

using vw = uint16_t __attribute__((vector_size(W * 4)));
using vb = uint8_t __attribute__((vector_size(W * 4)));

// The same of four channels, and the codes of 4 bits as bytes: where one instruction does it.
vi madd8(vi sum, int32_t x, vb w);
vb decode_bytes(vb index);

#if FN_AVX512 && defined(__AVX512VNNI__)
constexpr int NARROW = 8;  // bits in which integers of 8 bits are kept
FN_INLINE vi madd8(vi sum, int32_t x, vb w) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
FN_INLINE vb decode_bytes(vb index) {
    return (vb)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)CODES_UP)), (__m512i)index);
}
#else
constexpr int NARROW = 16;
#endif

template <int J>
FN_INLINE vs decode4(vw v) {
#if FN_AVX512  // an index is five bits of a lane; the fifth is the next code's, so the table stands there twice
    return (vs)_mm512_permutexvar_epi16((__m512i)(v >> (4 * J)), _mm512_load_si512(CODES));
#elif FN_AVX2
    const __m256i index = _mm256_or_si256(_mm256_and_si256((__m256i)(v >> (4 * J)), _mm256_set1_epi16(15)),
                                          _mm256_set1_epi16(int16_t(0x8000)));  // which makes the upper byte 0
    return (vs)_mm256_sub_epi16(_mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)CODES_UP), index),
                                _mm256_set1_epi16(127));
#else
    vs out;
    for (int i = 0; i < 2 * W; i++) out[i] = CODES[v[i] >> (4 * J) & 15];
    return out;
#endif
}

struct Product {
    const void* x;
    const uint8_t* codes;
    const bf16* scales;
    int64_t M, K, x_stride;
    Result out;
};

// Rows of x as integers: value = integer * scale of its group.
struct Rows {
    const char* at;
    int64_t stride;  // bytes
    const float* scale;
    const int32_t* start;  // of the sums, a number for each group
    int64_t groups;
};

// How many sums a row and vector have: few rows have too few of them to hide how long an addition takes.
template <int R>
constexpr int SETS = R == 1 ? 4 : R == 2 ? 2 : 1;

template <int R>
using Sums = vi[SETS<R>][R][NV];

template <int R, class V>
FN_INLINE void add(Sums<R>& sum, int j, const int32_t* const (&x)[R], int64_t at, const V (&w)[NV]) {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            vi& s = sum[j % SETS<R>][i][n];
            if constexpr (std::is_same_v<V, vs>)
                s = madd16(s, x[i][at], w[n]);
            else
                s = madd8(s, x[i][at], w[n]);
        }
}

// Eight channels from k on, of rows whose integers have S bits; `at` points to their codes of the first column.
template <int BITS, int S, int R>
FN_INLINE void add_eight(Sums<R>& sum, const int32_t* const (&x)[R], int64_t k, const uint8_t* at, int ahead) {
    const int64_t from = k * S / 32;
    if constexpr (BITS == 8) {
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            vb v[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) {
                v[n] = load<vb>(at + q * PANEL * 4 + n * W * 4);
                __builtin_prefetch(at + q * PANEL * 4 + n * W * 4 + ahead, 0, 2);
            }
            if constexpr (S == 8) {
                add<R>(sum, q, x, from + q, v);
            } else {
                vs even[NV], odd[NV];
#pragma GCC unroll 4
                for (int n = 0; n < NV; n++) even[n] = (vs)((vw)v[n] & 0xff), odd[n] = (vs)((vw)v[n] >> 8);
                add<R>(sum, 2 * q, x, from + 2 * q, even);
                add<R>(sum, 2 * q + 1, x, from + 2 * q + 1, odd);
            }
        }
    } else {
        vw v[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            v[n] = load<vw>(at + n * W * 4);
            __builtin_prefetch(at + n * W * 4 + ahead, 0, 2);
        }
        if constexpr (S == 8) {
            vb w[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode_bytes((vb)v[n] & 15);
            add<R>(sum, 0, x, from, w);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode_bytes((vb)(v[n] >> 4) & 15);
            add<R>(sum, 1, x, from + 1, w);
        } else {
            vs w[NV];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode4<0>(v[n]);
            add<R>(sum, 0, x, from, w);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode4<1>(v[n]);
            add<R>(sum, 1, x, from + 1, w);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode4<2>(v[n]);
            add<R>(sum, 2, x, from + 2, w);
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = decode4<3>(v[n]);
            add<R>(sum, 3, x, from + 3, w);
        }
    }
}

FN_INLINE vf to_float(vi v) {
#if FN_AVX512
    return (vf)_mm512_cvtepi32_ps((__m512i)v);
#else
    return __builtin_convertvector(v, vf);
#endif
}

// Columns [n, n + NV * W) for `count` <= R rows from row m on; a row beyond them is the last one once more, and left.
template <class T, int BITS, int S, int R>
void rows(int count, const Rows& x, const uint8_t* codes, const bf16* scales, const Product& p, int64_t m, int64_t n) {
    constexpr int G = GROUP<BITS>;
    constexpr int STEP = PANEL * BITS;  // bytes from eight channels to the next
    const int ahead = m == 0 ? AHEAD<R, (8 / BITS) * (S / 8)> : 0;
    const int32_t* at[R];
    int64_t group[R];
    for (int i = 0; i < R; i++) {
        const int64_t row = m + (i < count ? i : count - 1);
        at[i] = (const int32_t*)(x.at + row * x.stride);
        group[i] = row * x.groups;
    }
    vf total[R][NV] = {};
    const int64_t depth = (p.K + DEEP - 1) / DEEP * DEEP;
    for (int64_t g = 0; g < x.groups; g++) {
        const int64_t end = depth < (g + 1) * G ? depth : (g + 1) * G;
        Sums<R> sum;
#pragma GCC unroll 4
        for (int j = 0; j < SETS<R>; j++)
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    sum[j][i][v] = BIAS<BITS, S> && j == 0 ? splat(x.start[group[i] + g]) : vi{};
        for (int64_t k = g * G; k < end; k += DEEP) add_eight<BITS, S, R>(sum, at, k, codes + k / DEEP * STEP, ahead);
        vf scale[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) scale[v] = load_float(scales + g * PANEL + v * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                vi whole = sum[0][i][v];
#pragma GCC unroll 4
                for (int j = 1; j < SETS<R>; j++) whole = whole + sum[j][i][v];
                total[i][v] = fma(to_float(whole), scale[v] * splat(x.scale[group[i] + g]), total[i][v]);
            }
    }
    leave<T>(total, count, p.out, m, n);
}

// One row as integers of at most `most`, kept in S bits in the order of `ORDER`, zero up to a multiple of DEEP; a scale
// and a start for each group. A group with something infinite or undefined in it has an undefined scale.
template <class T, int BITS, int S>
void to_integers(const T* x, int64_t K, float most, void* out, float* scale, int32_t* start) {
    using I = std::conditional_t<S == 8, int8_t, int16_t>;
    constexpr int G = GROUP<BITS>;
    I* to = static_cast<I*>(out);
    for (int64_t g = 0; g * G < K; g++, to += G) {
        const T* from = x + g * G;
        const int n = int(K - g * G < G ? K - g * G : G);
        vf top = splat(0x1p-100f), poison = {};
        vf value[G / W];
        for (int k = 0; k < n; k += W) {
            const vf v = n - k >= W ? load_float(from + k) : load_float_part(from + k, n - k);
            value[k / W] = v;
            top = max((vf)((vu)v & 0x7fffffffu), top);
            poison = poison + v * splat(0.f);
        }
        const float largest = max_lane(top);
        scale[g] = largest / most + sum_lanes(poison);
        const vf inverse = splat(most / largest), magic = splat(12582912.f);
        alignas(64) int32_t whole[G + DEEP] = {};
        vi sum = {};
        for (int k = 0; k < n; k += W) {
            const vi v = (vi)(value[k / W] * inverse + magic) - (vi)magic;
            sum = sum + v;
            store(whole + k, v);
        }
        int32_t total = 0;
        for (int i = 0; i < W; i++) total += sum[i];
        start[g] = -BIAS<BITS, S> * total;
        for (int k = 0; k < n; k += DEEP)
            for (int i = 0; i < DEEP; i++) to[k + i] = I(whole[k + ORDER<BITS, S>[i]]);
    }
}

template <class T, int BITS, int S>
void multiply_all(const Product& p, float most, int threads) {
    constexpr int G = GROUP<BITS>;
    const int64_t stride = (p.K + 31) / 32 * 32 * (S / 8), groups = (p.K + G - 1) / G;
    static thread_local Scratch scratch;
    char* memory = scratch.reserve(p.M * (stride + groups * 8));
    float* scale = (float*)(memory + p.M * stride);
    int32_t* start = (int32_t*)(scale + p.M * groups);
    each(p.M, p.M * p.K < 1 << 16 ? 1 : threads, [&](int64_t m) {
        to_integers<T, BITS, S>(static_cast<const T*>(p.x) + m * p.x_stride, p.K, most, memory + m * stride,
                                scale + m * groups, start + m * groups);
    });
    const Rows x{memory, stride, scale, start, groups};
    const int64_t bytes = (p.K + DEEP - 1) / DEEP * PANEL * BITS;
    walk<MR>(p.M, p.out.N, p.K, threads, [&](int64_t panel, int v, int64_t m, int count) {
        const uint8_t* codes = p.codes + panel * bytes + v * W * 4;
        const bf16* scales = p.scales + panel * groups * PANEL + v * W;
        const int64_t n = panel * PANEL + v * W;
        constexpr int FEW = MR / 3 < 2 ? 2 : MR / 3;
        if (count > MR * 2 / 3)
            rows<T, BITS, S, MR>(count, x, codes, scales, p, m, n);
        else if (count > FEW)
            rows<T, BITS, S, MR * 2 / 3>(count, x, codes, scales, p, m, n);
        else if (count > 2)
            rows<T, BITS, S, FEW>(count, x, codes, scales, p, m, n);
        else if (count == 2)
            rows<T, BITS, S, 2>(count, x, codes, scales, p, m, n);
        else
            rows<T, BITS, S, 1>(count, x, codes, scales, p, m, n);
    });
}

// ---- codes from a weight --------------------------------------------------------------------------------------------

FN_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }

// How many of the thresholds between neighbouring codes a value exceeds: the index of the nearest code.
FN_INLINE vi nearest(vf v) {
    vi index = {};
#pragma GCC unroll 16
    for (int i = 0; i < 15; i++) index = index - (vi)(v > splat((CODES[i] + CODES[i + 1]) * 0.5f));
    return index;
}

FN_INLINE vf value_of(vi index) {
#if FN_AVX512
    return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(
                                                         _mm256_load_si256((const __m256i*)CODES))));
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = CODES[index[i]];
    return out;
#endif
}

FN_INLINE vf rounded(vf v) {
    bf16 a[W];
    store_float(a, v);
    return load_float(a);
}

// Scales tried for a group of 4 bits: its largest value becomes this much of the first code.
constexpr float TRIED[] = {1.f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};

// `depth` channels of W columns, channel k at w[k * PANEL] -> their codes and scale.
template <int BITS>
FN_INLINE void encode(const float* w, int depth, uint8_t* code, bf16* scale_out) {
    vf largest = {};
    for (int k = 0; k < depth; k++) {
        const vf v = load<vf>(w + k * PANEL);
        largest = magnitude(v) > magnitude(largest) ? v : largest;
    }
    vf best = {};
    if constexpr (BITS == 8) {
        // Rounded up to bfloat16, so that no code exceeds 127.
        best = magnitude(largest) / splat(127.f);
        best = (vf)(((vu)best + 0xffffu) & 0xffff0000u);
    } else {
        vf least = splat(3e38f);
        for (float tried : TRIED) {
            const vf scale = rounded(largest / splat(tried * float(CODES[0])));
            const vf inverse = scale != vf{} ? splat(1.f) / scale : vf{};
            vf error = {};
            for (int k = 0; k < depth; k++) {
                const vf v = load<vf>(w + k * PANEL), e = value_of(nearest(v * inverse)) * scale - v;
                error = error + e * e;
            }
            const vi better = error < least;
            best = better ? scale : best;
            least = better ? error : least;
        }
    }
    store_float(scale_out, best);
    const vf inverse = best != vf{} ? splat(1.f) / best : vf{}, magic = splat(12582912.f);
    for (int k = 0; k < depth; k++) {
        const vf v = load<vf>(w + k * PANEL) * inverse;
        vi c;
        if constexpr (BITS == 8)
            c = (vi)(v + magic) - (vi)magic;
        else
            c = nearest(v);
        for (int i = 0; i < W; i++) code[k * PANEL + i] = uint8_t(BITS == 8 ? c[i] + 128 : c[i]);
    }
}

template <class T, int BITS>
void encode_all(const T* w, uint8_t* codes, bf16* scales, int64_t N, int64_t K, int64_t stride, int threads) {
    constexpr int G = GROUP<BITS>;
    const int64_t groups = (K + G - 1) / G, bytes = (K + DEEP - 1) / DEEP * PANEL * BITS;
    each_near((N + PANEL - 1) / PANEL, threads, [&](int64_t panel) {
        alignas(64) float block[G * PANEL];
        alignas(64) uint8_t code[G * PANEL];
        for (int64_t g = 0; g < groups; g++) {
            const int64_t k0 = g * G;
            const int depth = int(K - k0 < G ? K - k0 : G), padded = (depth + DEEP - 1) / DEEP * DEEP;
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t n = panel * PANEL + c;
                float row[G + W] = {};
                if (n < N)
                    for (int k = 0; k < depth; k += W) {
                        const T* from = w + n * stride + k0 + k;
                        store(row + k, depth - k >= W ? load_float(from) : load_float_part(from, depth - k));
                    }
                for (int k = 0; k < depth; k++) block[k * PANEL + c] = row[k];
            }
            memset(code, 0, sizeof code);
            for (int c = 0; c < PANEL; c += W)
                encode<BITS>(block + c, depth, code + c, scales + (panel * groups + g) * PANEL + c);
            uint8_t* to = codes + panel * bytes + k0 / DEEP * PANEL * BITS;
            for (int k = 0; k < padded; k += DEEP, to += PANEL * BITS)
                for (int c = 0; c < PANEL; c++) {
                    const uint8_t* from = code + k * PANEL + c;
                    if constexpr (BITS == 8)
                        for (int i = 0; i < DEEP; i++) to[(i / 4 * PANEL + c) * 4 + i % 4] = from[i * PANEL];
                    else
                        for (int i = 0; i < 4; i++) {  // byte 2p + h: channels 4h + p and 4h + p + 2
                            const uint8_t* two = from + (4 * (i & 1) + (i >> 1)) * PANEL;
                            to[c * 4 + i] = uint8_t(two[0] | two[2 * PANEL] << 4);
                        }
                }
        }
    });
}

}  // namespace
}  // namespace fn

// y [M, N] = x [M, K] weight^T + bias, x, bias and y of the library's element type, y of floats if `wide`; codes and
// scales as fn_quantize makes them with as many bits, bias or null, strides in elements. `dynamic`: rows of x are rounded
// to 8 bits, not to 16.
extern "C" void fn_quantized_linear(const void* x, const void* codes, const void* scales, const void* bias, void* y,
                                    int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t y_stride, int64_t bits,
                                    int64_t dynamic, int64_t wide, int threads) {
    using namespace fn;
    const Product p{x, static_cast<const uint8_t*>(codes), static_cast<const bf16*>(scales), M, K, x_stride,
                    {bias, y, N, y_stride, wide != 0}};
    if (bits == 8)
        dynamic ? multiply_all<Element, 8, NARROW>(p, 127.f, threads) : multiply_all<Element, 8, 16>(p, 32767.f, threads);
    else
        dynamic ? multiply_all<Element, 4, NARROW>(p, 127.f, threads) : multiply_all<Element, 4, 16>(p, 32767.f, threads);
}

// w: [N, K] elements, rows `stride` apart -> codes, see above; scales: [ceil(N / 32), groups, 32] of bfloat16.
extern "C" void fn_quantize(const void* w, void* codes, void* scales, int64_t N, int64_t K, int64_t stride, int64_t bits,
                            int threads) {
    using namespace fn;
    const Element* from = static_cast<const Element*>(w);
    if (bits == 8)
        encode_all<Element, 8>(from, static_cast<uint8_t*>(codes), static_cast<bf16*>(scales), N, K, stride, threads);
    else
        encode_all<Element, 4>(from, static_cast<uint8_t*>(codes), static_cast<bf16*>(scales), N, K, stride, threads);
}
