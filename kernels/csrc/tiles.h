// Arithmetic on one tile of KV: scores, online softmax, weighted sums. The order of every sum is fixed here; see
// attention.cpp for why, and for what is done with it.
#pragma once
#include <cmath>
#include <type_traits>

#include "pool.h"
#include "simd.h"

namespace fn {
namespace {

constexpr int TILE = 64;               // KV tokens
constexpr int BLOCKS = TILE / BLOCK;   // they lie in
constexpr float NONE = -INFINITY;      // score of a token that is not seen

// ---- memory that will be read next -----------------------------------------------------------------------------------

// KV on its way to the second-level cache, a few lines at a time among the arithmetic: a burst would fill the miss
// buffers and stall it. A head of a block is one piece, and where the next piece lies the hardware does not foresee.
class Ahead {
  public:
    FN_INLINE void add(const void* p, int bytes) {
        at_[pieces_++] = (const char*)p;
        bytes_ = bytes;
    }

    FN_INLINE void fetch() {
        if (piece_ == pieces_) return;
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) __builtin_prefetch(at_[piece_] + byte_ + i * 64, 0, 2);
        if ((byte_ += LINES * 64) >= bytes_) byte_ = 0, piece_++;
    }

    static constexpr int LINES = 4;

  private:
    const char* at_[2 * BLOCKS];
    int bytes_ = 0, pieces_ = 0, piece_ = 0, byte_ = 0;
};

// ---- a tile where it lies --------------------------------------------------------------------------------------------

struct Tile {  // one KV head of `count` tokens of a row, from a multiple of TILE on
    const Code *k[BLOCKS], *v[BLOCKS];
    int count;

    FN_INLINE int blocks() const { return (count + BLOCK - 1) / BLOCK; }
};

// A block of one head of K (tokens in lanes) as V has it (channels in lanes).
inline void keys_as_values(const Code* k, int C, Code* v) {
    int c = 0;
    if constexpr (PER * sizeof(Code) == 4)  // an atom is a lane
        for (; c + W * PER <= C; c += W * PER)
            for (int t = 0; t < BLOCK; t += W) {
                vu row[W];
                for (int i = 0; i < W; i++) row[i] = load<vu>(k + (c + i * PER) * BLOCK + t * PER);
                transpose(row);  // of token t + i, the atoms from channel c on
                Code flat[W][W * PER];
                for (int i = 0; i < W; i++) store(PER == 1 ? v + (t + i) * C + c : flat[i], row[i]);
                if constexpr (PER == 2)
                    for (int i = 0; i < W; i += 2)
                        for (int n = 0; n < 2; n++)
                            store(v + (t + i) * C + (c + n * W) * 2,
                                  widen(load<vh>(flat[i] + n * W)) | widen(load<vh>(flat[i + 1] + n * W)) << 16);
            }
    for (; c < C; c++)
        for (int t = 0; t < BLOCK; t++)
            v[t / PER * PER * C + c * PER + t % PER] = k[c / PER * PER * BLOCK + t * PER + c % PER];
}

// What a product reads on its right: vector n of row k of part p begins at at(p, n) + k * step.
struct Keys {  // a row is an atom, a lane a token; one part
    const Tile& tile;
    int atoms;
    static constexpr int parts = 1, step = BLOCK * PER;

    FN_INLINE int rows(int) const { return atoms; }
    FN_INLINE const Code* at(int, int n) const { return tile.k[n * W / BLOCK] + HEAD + n * W % BLOCK * PER; }
};

struct Values {  // a row is PER tokens, a lane a channel; a part is a block, and an odd last token, in `odd`
    const Tile& tile;
    const uint32_t* odd;
    int step, parts;

    // `odd` has room for C atoms. Beside an odd last token lies one that nobody sees: its former owner may have left NaN
    // there, which a weight of 0 would not silence. Integers it silences.
    Values(const Tile& t, int C, uint32_t* odd) : tile(t), odd(odd), step(C * PER), parts(t.blocks()) {
        if (ROUNDED || t.count % PER == 0) return;
        const Code* pair = t.v[parts - 1] + t.count % BLOCK / PER * step;
        for (int c = 0; c < C; c++) {
            uint32_t atom;
            memcpy(&atom, pair + c * PER, sizeof atom);
            odd[c] = atom & 0xffff;
        }
        parts++;
    }

    FN_INLINE bool is_odd(int p) const { return p == tile.blocks(); }
    FN_INLINE int rows(int p) const {
        const int rest = tile.count - p * BLOCK;
        return is_odd(p) ? 1 : ((rest < BLOCK ? rest : BLOCK) + (ROUNDED ? 1 : 0)) / PER;
    }
    FN_INLINE const Code* at(int p, int n) const { return (is_odd(p) ? (const Code*)odd : tile.v[p] + HEAD) + n * W * PER; }
};

// ---- products -------------------------------------------------------------------------------------------------------

FN_INLINE vi madd(vi sum, uint32_t a, vu b) { return madd16(sum, int32_t(a), (vs)b); }

FN_INLINE vf madd(vf sum, uint32_t a, vu b) {
#if FN_AVX512_BF16
    if constexpr (PAIRS)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    else
#endif
        return fma((vf)splat(a), (vf)b, sum);
}

FN_INLINE vu load_atoms(const Code* p) {
    if constexpr (ROUNDED)
        return (vu)widen8((const int8_t*)p);
    else if constexpr (PAIRS)
        return load<vu>(p);
    else
        return (vu)load_float((const Element*)p);
}

FN_INLINE vu load_atoms_part(const Code* p, int atoms) {  // zero beyond the first `atoms`
    Code a[W * PER] = {};
    memcpy(a, p, sizeof(Code) * PER * atoms);
    return load_atoms(a);
}

using Sum = std::conditional_t<ROUNDED, vi, vf>;

struct Scales {  // of rows of a product
    const float* factor;  // of what c holds already; null: c starts at zero
    const float* unit;    // of the sum, where it is one of integers

    FN_INLINE Scales from(int i) const { return {factor ? factor + i : nullptr, unit + i}; }
};

// c[i][n] = c[i][n] * factor[i] + sum over k of a[i][k] * b[k][n] for MR rows i and NV vectors n from vector `first` on,
// k from 0 up. Of b only `lanes` atoms of a vector are read unless WHOLE.
template <int MR, int NV, bool WHOLE, class B>
void multiply_block(const uint32_t* a, int lda, const B& b, int first, int lanes, float* c, int ldc, const Scales& scale,
                    Ahead& ahead) {
    Sum sum[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++)
            {
            sum[i][n] = Sum{};
            if constexpr (!ROUNDED)
                if (scale.factor) sum[i][n] = load<vf>(c + i * ldc + n * W) * splat(scale.factor[i]);
        }
    for (int p = 0; p < b.parts; p++) {
        const Code* at[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) at[n] = b.at(p, first + n);
        const int rows = b.rows(p);
        for (int k = 0; k < rows; k++, a++) {
            vu bk[NV];
            ahead.fetch();
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) {
                const Code* from = at[n] + k * b.step;
                bk[n] = WHOLE ? load_atoms(from) : load_atoms_part(from, lanes);
            }
#pragma GCC unroll 8
            for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
                for (int n = 0; n < NV; n++) sum[i][n] = madd(sum[i][n], a[i * lda], bk[n]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            float* to = c + i * ldc + n * W;
            if constexpr (ROUNDED) {
                const vf x = __builtin_convertvector(sum[i][n], vf) * splat(scale.unit[i]);
                store(to, scale.factor ? load<vf>(to) * splat(scale.factor[i]) + x : x);
            } else {
                store(to, sum[i][n]);
            }
        }
}

constexpr int MOST_ROWS = W == 16 ? 6 : 2;  // with four vectors the sums fill the registers

template <int MR, int NV, bool WHOLE, class B>
void multiply_rows(const uint32_t* a, int lda, const B& b, int first, int lanes, float* c, int ldc, int rows,
                   const Scales& scale, Ahead& ahead) {
    int i = 0;
    for (; i + MR <= rows; i += MR)
        multiply_block<MR, NV, WHOLE>(a + i * lda, lda, b, first, lanes, c + i * ldc, ldc, scale.from(i),
                                      ahead);
    if constexpr (MR > 1)
        if (i < rows)
            multiply_rows<(MR > 2 ? MR - 2 : 1), NV, WHOLE>(a + i * lda, lda, b, first, lanes, c + i * ldc, ldc, rows - i,
                                                            scale.from(i), ahead);
}

// The same for any number of rows and `columns` lanes; c has whole vectors.
template <class B>
void multiply(const uint32_t* a, int lda, const B& b, float* c, int ldc, int rows, int columns, const Scales& scale,
              Ahead& ahead) {
    int n = 0;
    for (; (n + 4) * W <= columns; n += 4)
        multiply_rows<MOST_ROWS, 4, true>(a, lda, b, n, W, c + n * W, ldc, rows, scale, ahead);
    for (; (n + 2) * W <= columns; n += 2)
        multiply_rows<MOST_ROWS, 2, true>(a, lda, b, n, W, c + n * W, ldc, rows, scale, ahead);
    for (; (n + 1) * W <= columns; n++)
        multiply_rows<MOST_ROWS, 1, true>(a, lda, b, n, W, c + n * W, ldc, rows, scale, ahead);
    if (n * W < columns)
        multiply_rows<MOST_ROWS, 1, false>(a, lda, b, n, columns - n * W, c + n * W, ldc, rows, scale, ahead);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

struct Running {  // online softmax of one (query, head)
    float peak;   // largest score so far
    vf total;     // sum of weights, token j in lane j % W
};

// tanh within 2e-7, the same in every lane. Near 0, where 1 - e^-2|x| cancels, by its series.
FN_INLINE vf tanh(vf x) {
    const vf a = x < vf{} ? -x : x, one = splat(1.f), e = exp_negative(a * splat(-2.f)), far = (one - e) / (one + e), b = x * x;
    vf p = splat(-17.f / 315.f);
    p = fma(p, b, splat(2.f / 15.f));
    p = fma(p, b, splat(-1.f / 3.f));
    p = fma(p * b, x, x);
    return a < splat(0.2f) ? p : x < vf{} ? -far : far;
}

FN_INLINE vi nearest(vf x) {  // |x| < 2^22; ties to even
    const vf magic = splat(12582912.f);
    return (vi)(x + magic) - (vi)magic;
}

// Turns scores [first, last) of a tile into weights and the rest into 0; returns the factor of what was summed before.
// Rounded weights are times the scales of V, and `unit` is what their integers are multiples of.
FN_INLINE float weigh(float* score, uint32_t* weight, const Tile& tile, int first, int last, float scale, float cap,
                      Running& run, float& unit) {
    const int vectors = (tile.count + W - 1) / W;
    vf s[TILE / W];
    vf top = splat(NONE), largest{};
    for (int n = 0; n < vectors; n++) {
        vi j = lanes() + n * W;
        vf x = load<vf>(score + n * W);
        if constexpr (ROUNDED) x = x * load<vf>((const float*)tile.k[n * W / BLOCK] + n * W % BLOCK);
        x = x * splat(scale);
        if (cap > 0) x = tanh(x / splat(cap)) * splat(cap);
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
        if constexpr (ROUNDED) {
            vi j = lanes() + n * W;
            vf x = w * load<vf>((const float*)tile.v[n * W / BLOCK] + n * W % BLOCK);
            s[n] = ((j >= first) & (j < last)) ? x : vf{};
            largest = max(largest, s[n]);
        } else if constexpr (PAIRS) {
            store((uint16_t*)weight + n * W, round_bf16(w));
        } else {
            store(weight + n * W, w);
        }
    }
    if constexpr (ROUNDED) {
        const float most = max_lane(largest), inverse = most < LEAST ? 0 : 32767.f / most;
        unit = most < LEAST ? 0 : most / 32767.f;
        for (int n = 0; n < vectors; n++) store((uint16_t*)weight + n * W, narrow((vu)nearest(s[n] * splat(inverse))));
    }
    return factor;
}

}  // namespace
}  // namespace fn
