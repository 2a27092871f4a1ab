// y = x w^T + bias with the weight as codes of 8 or 4 bits, decoded in registers; and the codes from a weight.
//
// Codes lie in panels of PANEL rows of the weight, as in linear.cpp, and every group of a column's channels has a scale.
// A row of x enters as integers of 16 bits with a scale for each of the same groups, so a group's sum is one of
// integers: exact, hence the same in any order and on every processor. Groups are scaled and added as floats from 0 up.
// Sixteen bits against the group's largest value cost less than bfloat16's own eight, and pairs of them are multiplied
// and added by one instruction everywhere (AVX512-VNNI, else madd), where codes would first have to become floats.
//
//   8 bits: [panels, K / 2, 32 columns, 2 channels], the integer itself.
//   4 bits: [panels, K / 8, 32 columns, 2 channels of 16 bits]; bits 4j to 4j + 3 are the code of channel 8k + 2j (or
//           the next one), an index into CODES. One load gives four vectors by shifts.
#include <cstdlib>

#include "parallel.h"
#include "simd.h"

namespace fn {
namespace {

constexpr int PANEL = 32;
constexpr int NV = 2;                             // vectors of columns done together
constexpr int MR = W == 4 ? 6 : W == 8 ? 4 : 12;  // rows done together
constexpr int DEEP = 8;                           // K is rounded up to this
constexpr int AHEAD = 4096;                       // bytes of codes asked for before they are needed

// What the 16 codes stand for, times the scale: closer together where weights are many. Source: IQ4_NL of llama.cpp.
alignas(64) constexpr int16_t CODES[32] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
                                           -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(64) [[maybe_unused]] constexpr uint8_t CODES_UP[32] = {  // + 127, as bytes
    0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240,
    0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240};

template <int BITS>
constexpr int GROUP = BITS == 8 ? 128 : 32;  // channels that share a scale

using vw = uint16_t __attribute__((vector_size(W * 4)));

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
    const void *x, *bias;
    const uint8_t* codes;
    const bf16* scales;
    void* y;
    int64_t M, N, K, x_stride, y_stride;
};

// Rows of x as integers: value = integer * scale of its group.
struct Rows {
    const int16_t* at;
    int64_t stride;
    const float* scale;
    int64_t groups;
};

// How many sums a row and vector have: few rows have too few of them to hide how long an addition takes.
template <int R>
constexpr int SETS = R == 1 ? 4 : R == 2 ? 2 : 1;

template <int R>
using Sums = vi[SETS<R>][R][NV];

template <int R>
FN_INLINE void add(Sums<R>& sum, int j, const int32_t* const (&x)[R], int64_t pair, const vs (&w)[NV]) {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++)
            sum[j % SETS<R>][i][n] = madd16(sum[j % SETS<R>][i][n], x[i][pair + j], w[n]);
}

// Eight channels from k on; `at` points to their codes of the first column.
template <int BITS, int R>
FN_INLINE void add_eight(Sums<R>& sum, const int32_t* const (&x)[R], int64_t k, const uint8_t* at, int ahead) {
    vs w[NV];
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) w[n] = widen8((const int8_t*)at + j * PANEL * 2 + n * W * 2);
            __builtin_prefetch(at + j * PANEL * 2 + ahead, 0, 2);
            add<R>(sum, j, x, k / 2, w);
        }
    } else {
        vw v[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            v[n] = load<vw>(at + n * W * 4);
            __builtin_prefetch(at + n * W * 4 + ahead, 0, 2);
        }
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) w[n] = decode4<0>(v[n]);
        add<R>(sum, 0, x, k / 2, w);
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) w[n] = decode4<1>(v[n]);
        add<R>(sum, 1, x, k / 2, w);
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) w[n] = decode4<2>(v[n]);
        add<R>(sum, 2, x, k / 2, w);
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) w[n] = decode4<3>(v[n]);
        add<R>(sum, 3, x, k / 2, w);
    }
}

template <class T>
FN_INLINE void put(T* y, vf v, const T* bias, int64_t columns) {
    if (columns >= W) {
        store_float(y, bias ? v + load_float(bias) : v);
    } else if (columns > 0) {
        T part[W];
        store_float(part, bias ? v + load_float_part(bias, int(columns)) : v);
        memcpy(y, part, sizeof(T) * columns);
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
template <class T, int BITS, int R>
void rows(int count, const Rows& x, const uint8_t* codes, const bf16* scales, const Product& p, int64_t m, int64_t n,
          int ahead) {
    constexpr int G = GROUP<BITS>;
    constexpr int STEP = PANEL * BITS;  // bytes from eight channels to the next
    const int32_t* at[R];
    const float* factor[R];
    for (int i = 0; i < R; i++) {
        const int64_t row = m + (i < count ? i : count - 1);
        at[i] = (const int32_t*)(x.at + row * x.stride);
        factor[i] = x.scale + row * x.groups;
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
                for (int v = 0; v < NV; v++) sum[j][i][v] = vi{};
        for (int64_t k = g * G; k < end; k += DEEP) add_eight<BITS, R>(sum, at, k, codes + k / DEEP * STEP, ahead);
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
                total[i][v] = fma(to_float(whole), scale[v] * splat(factor[i][g]), total[i][v]);
            }
    }
    const T* bias = static_cast<const T*>(p.bias);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
        if (i >= count) break;
        T* y = static_cast<T*>(p.y) + (m + i) * p.y_stride;
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            const int64_t c = n + v * W;
            put(y + c, total[i][v], bias ? bias + c : nullptr, p.N - c);
        }
    }
}

// One row as integers. A group with something infinite or undefined in it has an undefined scale.
template <class T, int G>
void to_integers(const T* x, int64_t K, int16_t* out, float* scale) {
    for (int64_t g = 0; g * G < K; g++) {
        const int64_t end = K < (g + 1) * G ? K : (g + 1) * G;
        vf top = splat(0x1p-100f), poison = {};
        vf value[G / W];
        for (int64_t k = g * G; k < end; k += W) {
            const vf v = end - k >= W ? load_float(x + k) : load_float_part(x + k, int(end - k));
            value[(k - g * G) / W] = v;
            top = max((vf)((vu)v & 0x7fffffffu), top);
            poison = poison + v * splat(0.f);
        }
        const float most = max_lane(top);
        scale[g] = most / 32767.f + sum_lanes(poison);
        const vf inverse = splat(32767.f / most), magic = splat(12582912.f);
        for (int64_t k = g * G; k < end; k += W) {
            const vf shifted = value[(k - g * G) / W] * inverse + magic;
            store(out + k, narrow((vu)((vi)shifted - (vi)magic)));
        }
    }
}

// Memory of this thread's own, kept from call to call.
char* scratch(int64_t bytes) {
    static thread_local char* memory = nullptr;
    static thread_local int64_t size = 0;
    if (bytes > size) {
        free(memory);
        memory = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!memory) abort();
        size = bytes;
    }
    return memory;
}

template <class T, int BITS>
FN_INLINE void some_rows(int count, const Rows& x, const uint8_t* codes, const bf16* scales, const Product& p,
                         int64_t m, int64_t n, int ahead) {
    if (count > MR * 2 / 3)
        rows<T, BITS, MR>(count, x, codes, scales, p, m, n, ahead);
    else if (count > (MR / 3 < 2 ? 2 : MR / 3))
        rows<T, BITS, MR * 2 / 3>(count, x, codes, scales, p, m, n, ahead);
    else if (count > 2)
        rows<T, BITS, (MR / 3 < 2 ? 2 : MR / 3)>(count, x, codes, scales, p, m, n, ahead);
    else if (count == 2)
        rows<T, BITS, 2>(count, x, codes, scales, p, m, n, ahead);
    else
        rows<T, BITS, 1>(count, x, codes, scales, p, m, n, ahead);
}

template <class T, int BITS>
void multiply_all(const Product& p, int threads) {
    constexpr int G = GROUP<BITS>;
    const int64_t stride = (p.K + 15) / 16 * 16, groups = (p.K + G - 1) / G, panels = (p.N + PANEL - 1) / PANEL;
    char* memory = scratch(p.M * (stride * 2 + groups * 4));
    int16_t* integers = (int16_t*)memory;
    float* factors = (float*)(memory + p.M * stride * 2);
    if (p.M * p.N * p.K < 1 << 18) threads = 1;
    each(p.M, p.M * p.K < 1 << 16 ? 1 : threads, [&](int64_t m) {
        memset(integers + m * stride + p.K / W * W, 0, (stride - p.K / W * W) * 2);
        to_integers<T, G>(static_cast<const T*>(p.x) + m * p.x_stride, p.K, integers + m * stride, factors + m * groups);
    });
    const Rows x{integers, stride, factors, groups};
    const int64_t bytes = (p.K + DEEP - 1) / DEEP * PANEL * BITS;
    each_near(panels, threads, [&](int64_t panel) {
        for (int64_t m = 0; m < p.M; m += MR)
            for (int64_t v = 0; v < PANEL / W; v += NV) {
                const uint8_t* codes = p.codes + panel * bytes + v * W * (BITS == 8 ? 2 : 4);
                const bf16* scales = p.scales + panel * groups * PANEL + v * W;
                const int64_t n = panel * PANEL + v * W;
                const int count = int(p.M - m < MR ? p.M - m : MR), ahead = m == 0 ? AHEAD : 0;
                some_rows<T, BITS>(count, x, codes, scales, p, m, n, ahead);
            }
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
        for (int i = 0; i < W; i++) code[k * PANEL + i] = uint8_t(c[i]);
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
                for (int c = 0; c < PANEL; c++)
                    for (int parity = 0; parity < 2; parity++) {
                        const uint8_t* from = code + (k + parity) * PANEL + c;  // channels k + parity + 2j
                        if constexpr (BITS == 8)
                            for (int j = 0; j < 4; j++) to[(j * PANEL + c) * 2 + parity] = from[2 * j * PANEL];
                        else
                            for (int j = 0; j < 2; j++)
                                to[c * 4 + parity * 2 + j] =
                                    uint8_t(from[4 * j * PANEL] | from[(4 * j + 2) * PANEL] << 4);
                    }
        }
    });
}

}  // namespace
}  // namespace fn

// y [M, N] = x [M, K] weight^T + bias, x, bias and y of the library's element type; codes and scales as fn_quantize
// makes them with as many bits, bias or null, strides in elements.
extern "C" void fn_quantized_linear(const void* x, const void* codes, const void* scales, const void* bias, void* y,
                                    int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t y_stride, int64_t bits,
                                    int threads) {
    using namespace fn;
    const Product p{x, bias, static_cast<const uint8_t*>(codes), static_cast<const bf16*>(scales), y, M, N, K, x_stride,
                    y_stride};
    bits == 8 ? multiply_all<Element, 8>(p, threads) : multiply_all<Element, 4>(p, threads);
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
