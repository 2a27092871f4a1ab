// Arithmetic on one tile of KV: scores, online softmax, weighted sums. The order of every sum is fixed here; see
// attention.cpp for why, and for what is done with it.
#pragma once
#include <cmath>

#include "simd.h"

namespace fn {
namespace {

constexpr int TILE = 64;           // KV tokens
constexpr float NONE = -INFINITY;  // score of a token that is not seen
#if FN_AVX512
using vh32 = uint16_t __attribute__((vector_size(64)));
#endif

// ---- atoms ----------------------------------------------------------------------------------------------------------

template <bool PAIR>
FN_INLINE vf madd(vf sum, uint32_t a, vu b) {
#if FN_AVX512_BF16
    if constexpr (PAIR)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    else
#endif
        return fma((vf)splat(a), (vf)b, sum);
}

// c[i][n] = c[i][n] * factor[i] + sum over k of a[i][k] * b[k][n] for MR rows i and NV vectors n, k from 0 up.
// Without `factor` c starts at zero.
template <bool PAIR, int MR, int NV>
FN_INLINE void multiply_block(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int depth,
                              const float* factor) {
    vf sum[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++)
            sum[i][n] = factor ? load<vf>(c + i * ldc + n * W) * splat(factor[i]) : vf{};
    for (int k = 0; k < depth; k++) {
        vu bk[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) bk[n] = load<vu>(b + k * ldb + n * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            uint32_t aik = a[i * lda + k];
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) sum[i][n] = madd<PAIR>(sum[i][n], aik, bk[n]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) store(c + i * ldc + n * W, sum[i][n]);
}

template <bool PAIR, int NV>
void multiply_columns(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int depth,
                      const float* factor) {
    constexpr int MR = W == 16 ? 6 : 2;  // with NV = 4 the sums fill the registers
    int i = 0;
    for (; i + MR <= rows; i += MR)
        multiply_block<PAIR, MR, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, factor ? factor + i : nullptr);
    if constexpr (MR > 2)
        for (; i + 2 <= rows; i += 2)
            multiply_block<PAIR, 2, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, factor ? factor + i : nullptr);
    for (; i < rows; i++)
        multiply_block<PAIR, 1, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, factor ? factor + i : nullptr);
}

// The same for `vectors` vectors of columns.
template <bool PAIR>
void multiply(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int vectors, int depth,
              const float* factor) {
    int n = 0;
    for (; n + 4 <= vectors; n += 4)
        multiply_columns<PAIR, 4>(a, lda, b + n * W, ldb, c + n * W, ldc, rows, depth, factor);
    for (; n < vectors; n++)
        multiply_columns<PAIR, 1>(a, lda, b + n * W, ldb, c + n * W, ldc, rows, depth, factor);
}

// ---- memory that will be read next -----------------------------------------------------------------------------------

// Lines of KV on their way to the second-level cache, a few at a time among the arithmetic: a burst would fill the miss
// buffers and stall it. Heads are read one by one, a stride that the hardware does not foresee.
class Ahead {
  public:
    Ahead(const void* k, const void* v, const int64_t* offset, int tokens, int itemsize, int elements)
        : k_((const char*)k), v_((const char*)v), offset_(offset), tokens_(tokens), itemsize_(itemsize),
          bytes_(itemsize * elements) {}

    FN_INLINE void fetch() {  // LINES of K and as many of V
        if (token_ >= tokens_) return;
        const int64_t at = offset_[token_] * itemsize_ + byte_;
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) {
            __builtin_prefetch(k_ + at + i * 64, 0, 2);
            __builtin_prefetch(v_ + at + i * 64, 0, 2);
        }
        if ((byte_ += LINES * 64) >= bytes_) byte_ = 0, token_++;
    }

    static constexpr int LINES = 4;

  private:
    const char *k_, *v_;
    const int64_t* offset_;
    int tokens_, itemsize_, bytes_, token_ = 0, byte_ = 0;
};

// ---- packing --------------------------------------------------------------------------------------------------------

template <class T, bool PAIR>
FN_INLINE vu load_atoms(const T* p) {
    if constexpr (PAIR)
        return load<vu>(p);
    else
        return (vu)load_float(p);
}

template <class T, bool PAIR>
FN_INLINE vu load_atoms_part(const T* p, int channels) {  // zero beyond the first `channels`
    T a[W * (PAIR ? 2 : 1)] = {};
    memcpy(a, p, sizeof(T) * channels);
    return load_atoms<T, PAIR>(a);
}

// out[atom][token] = the atoms of `count` tokens' keys, zero for the rest of the vectors touched.
template <class T, bool PAIR>
void pack_keys(const T* pool, const int64_t* offset, int count, int C, uint32_t* out, Ahead& ahead) {
    constexpr int PER = PAIR ? 2 : 1;
    for (int j = 0; j < count; j += W)
        for (int c = 0; c < C; c += W * PER) {
            vu block[W];
            const T* from = pool + c;
            uint32_t* to = out + c / PER * TILE + j;
            ahead.fetch();
            if (count - j >= W && C - c >= W * PER) {
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) block[i] = load_atoms<T, PAIR>(from + offset[j + i]);
                transpose(block);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(to + i * TILE, block[i]);
            } else {
                const int channels = C - c < W * PER ? C - c : W * PER;
                for (int i = 0; i < W; i++)
                    block[i] = j + i < count ? load_atoms_part<T, PAIR>(from + offset[j + i], channels) : vu{};
                transpose(block);
                for (int i = 0; i < (channels + PER - 1) / PER; i++) store(to + i * TILE, block[i]);
            }
        }
}

// Channels of two tokens side by side: the atoms of values in pairs.
FN_INLINE void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
    store(out, widen(load<vh>(even)) | (widen(load<vh>(odd)) << 16));
}

// out[token or pair of tokens][channel], `width` (a multiple of W) channels, zero beyond C.
template <class T, bool PAIR>
void pack_values(const T* pool, const int64_t* offset, int count, int C, int width, uint32_t* out,
                 Ahead& ahead) {
    if constexpr (PAIR) {
        static const uint16_t zeros[W] = {};
        for (int j = 0; j < count; j += 2, out += width) {
            const uint16_t* a = (const uint16_t*)(pool + offset[j]);
            ahead.fetch();
            const uint16_t* b = j + 1 < count ? (const uint16_t*)(pool + offset[j + 1]) : nullptr;
            int c = 0;
#if FN_AVX512
            const __m512i low = (__m512i)vh32{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                              8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
            for (; c + 2 * W <= C; c += 2 * W) {
                const __m512i x = _mm512_loadu_si512(a + c), y = b ? _mm512_loadu_si512(b + c) : __m512i{};
                _mm512_store_si512(out + c, _mm512_permutex2var_epi16(x, low, y));
                _mm512_store_si512(out + c + W, _mm512_permutex2var_epi16(x, high, y));
            }
#endif
            for (; c + W <= C; c += W) interleave(a + c, b ? b + c : zeros, out + c);
            if (c < C) {
                uint16_t x[W] = {}, y[W] = {};
                memcpy(x, a + c, 2 * (C - c));
                if (b) memcpy(y, b + c, 2 * (C - c));
                interleave(x, y, out + c);
            }
        }
    } else {
        for (int j = 0; j < count; j++, out += width) {
            const T* from = pool + offset[j];
            ahead.fetch();
            int c = 0;
            for (; c + W <= C; c += W) store(out + c, load_atoms<T, false>(from + c));
            if (c < C) store(out + c, load_atoms_part<T, false>(from + c, C - c));
        }
    }
}

// ---- few rows: the same arithmetic straight from the pool ------------------------------------------------------------

// A packed tile pays when many rows share it. A decode step has as many rows as query heads share a KV head; these two
// do for at most FEW rows what pack and multiply do, in the same order, and store nothing in between.
constexpr int FEW = 4;
constexpr int NVF = W == 16 ? 4 : 2;  // vectors of channels at a time

template <class T, bool PAIR, int MR>
void score_few(const T* pool, const int64_t* offset, int count, int C, const uint32_t* query, int atoms, float* score,
               Ahead& ahead) {
    constexpr int PER = PAIR ? 2 : 1;
    for (int j = 0; j < count; j += W) {
        vf sum[MR] = {};
        const int last = count - j < W ? count - j - 1 : W - 1;  // stands in for tokens beyond it, which get no weight
        for (int c = 0; c < C; c += W * PER) {
            vu block[W];
            const T* from = pool + c;
            ahead.fetch();
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) block[i] = load_atoms<T, PAIR>(from + offset[j + (i < last ? i : last)]);
            transpose(block);
            const uint32_t* q = query + c / PER;
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
#pragma GCC unroll 4
                for (int r = 0; r < MR; r++) sum[r] = madd<PAIR>(sum[r], q[r * atoms + i], block[i]);
        }
        for (int r = 0; r < MR; r++) store(score + r * TILE + j, sum[r]);
    }
}

template <class T, bool PAIR>
FN_INLINE void load_values(const T* a, const T* b, vu (&out)[NVF]) {  // atoms of NVF * W channels
    if constexpr (PAIR) {
#if FN_AVX512
        const __m512i low = (__m512i)vh32{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 4
        for (int n = 0; n < NVF; n += 2) {
            const __m512i x = _mm512_loadu_si512(a + n * W), y = b ? _mm512_loadu_si512(b + n * W) : __m512i{};
            out[n] = (vu)_mm512_permutex2var_epi16(x, low, y);
            out[n + 1] = (vu)_mm512_permutex2var_epi16(x, high, y);
        }
#endif
    } else {
#pragma GCC unroll 4
        for (int n = 0; n < NVF; n++) out[n] = load_atoms<T, false>(a + n * W);
    }
}

template <class T, bool PAIR, int MR>
void sum_few(const T* pool, const int64_t* offset, int count, int C, const uint32_t* weight, float* out, int width,
             const float* factor, Ahead& ahead) {
    constexpr int PER = PAIR ? 2 : 1;
    for (int c = 0; c < C; c += NVF * W) {
        vf sum[MR][NVF];
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
            for (int n = 0; n < NVF; n++) sum[r][n] = load<vf>(out + r * width + c + n * W) * splat(factor[r]);
        for (int j = 0; j < count; j += PER) {
            vu v[NVF];
            ahead.fetch();
            load_values<T, PAIR>(pool + offset[j] + c, j + 1 < count ? pool + offset[j + 1] + c : nullptr, v);
#pragma GCC unroll 4
            for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
                for (int n = 0; n < NVF; n++)
                    sum[r][n] = madd<PAIR>(sum[r][n], weight[r * (TILE / PER) + j / PER], v[n]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
            for (int n = 0; n < NVF; n++) store(out + r * width + c + n * W, sum[r][n]);
    }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

struct Running {  // online softmax of one (query, head)
    float peak;   // largest score so far
    vf total;     // sum of weights, token j in lane j % W
};

// Turns scores [first, last) of a tile into weights and the rest into 0; returns the factor of what was summed before.
template <bool PAIR>
FN_INLINE float weigh(float* score, uint32_t* weight, int vectors, int first, int last, float scale, Running& run) {
    vf s[TILE / W];
    vf top = splat(NONE);
    for (int n = 0; n < vectors; n++) {
        vi j = lanes() + n * W;
        vf x = load<vf>(score + n * W) * splat(scale);
        s[n] = ((j >= first) & (j < last)) ? x : splat(NONE);
        top = max(top, s[n]);
    }
    float peak = max_lane(top);
    peak = peak > run.peak ? peak : run.peak;
    const float factor = exp_negative(splat(run.peak - peak))[0];
    run.peak = peak;
    run.total = run.total * splat(factor);
    for (int n = 0; n < vectors; n++) {
        vf w = exp_negative(s[n] - splat(peak));
        run.total = run.total + w;
        if constexpr (PAIR)
            store((uint16_t*)weight + n * W, round_bf16(w));
        else
            store(weight + n * W, w);
    }
    return factor;
}

}  // namespace
}  // namespace fn
