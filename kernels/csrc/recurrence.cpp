// Layers with a state: a short convolution over a row's tokens, and a memory that every token changes and reads.
//
// Lanes hold channels that never meet in a sum, and a thread takes some of them through all tokens of a row, one after
// another. So a token's bits do not depend on where a step began, on other rows, or on the number of threads.
//
// Before a row's tokens come the first behind[row] of those that were noted for it; its last guessed[r] tokens are noted
// and leave its state as it is before them.
#include "parallel.h"
#include "simd.h"

namespace fn {
namespace {

constexpr int VECTORS = 4, STRIP = VECTORS * W;  // channels that a thread takes
constexpr int MOST_TAPS = 16, MOST_KEYS = 512;

FN_INLINE vf read(const float* p, int n) { return n >= W ? load<vf>(p) : n > 0 ? load_float_part(p, n) : vf{}; }
FN_INLINE void write(float* p, vf v, int n) {
    if (n >= W) return store(p, v);
    if (n > 0) memcpy(p, &v, sizeof(float) * n);
}

// Rows among M, with no more tokens noted than K, before and now.
bool inside(const int32_t* row, const int32_t* start, const int32_t* behind, const int32_t* guessed, int64_t R,
            int64_t M, int64_t K) {
    for (int64_t r = 0; r < R; r++) {
        if (row[r] < 0 || row[r] >= M || start[r + 1] < start[r]) return false;
        const int64_t n = start[r + 1] - start[r], noted = behind[row[r]];
        if (noted < 0 || noted > K || guessed[r] < 0 || guessed[r] > n || guessed[r] > K) return false;
    }
    return true;
}

}  // namespace
}  // namespace fn

// x: rows of X channels, `stride` apart; weight [X, taps]; bias [X] or null; tail [.., taps - 1, X]; heard [M, K, X];
// y [T, X].
// 1 if a row is none of the M or notes more than K tokens, 2 if there are too many taps.
extern "C" int fn_causal_conv(const float* x, const float* weight, const float* bias, float* tail, float* heard,
                              const int32_t* row, const int32_t* start, const int32_t* length, const int32_t* behind,
                              const int32_t* guessed, float* y, int64_t stride, int64_t R, int64_t M, int64_t K,
                              int64_t X, int64_t taps, int threads) {
    using namespace fn;
    if (!inside(row, start, behind, guessed, R, M, K)) return 1;
    if (taps < 2 || taps > MOST_TAPS) return 2;
    const int64_t strips = (X + STRIP - 1) / STRIP;
    const int back = int(taps) - 1;
    each(R * strips, start[R] * X * taps > 1 << 16 ? threads : 1, [&](int64_t i) {
        const int64_t r = i / strips, x0 = i % strips * STRIP;
        const int n = int(X - x0 < STRIP ? X - x0 : STRIP);
        const int64_t begin = start[r], end = start[r + 1], sure = end - guessed[r];
        if (begin == end && !behind[row[r]]) return;
        vf w[MOST_TAPS][VECTORS], seen[MOST_TAPS][VECTORS], b[VECTORS];
        float *old = tail + row[r] * back * X + x0, *note = heard + row[r] * K * X + x0;
        const bool fresh = begin < end && length[r] == end - begin;
        for (int j = 0; j <= back; j++) {
            float column[STRIP] = {};
            for (int c = 0; c < n; c++) column[c] = weight[(x0 + c) * taps + j];
            for (int v = 0; v < VECTORS; v++) w[j][v] = load<vf>(column + v * W);
        }
        for (int v = 0; v < VECTORS; v++) b[v] = bias ? read(bias + x0 + v * W, n - v * W) : vf{};
        for (int j = 0; j < back; j++)
            for (int v = 0; v < VECTORS; v++) seen[j][v] = fresh ? vf{} : read(old + j * X + v * W, n - v * W);
        for (int64_t k = 0; k < (fresh ? 0 : behind[row[r]]); k++)
            for (int v = 0; v < VECTORS; v++) {
                seen[back][v] = read(note + k * X + v * W, n - v * W);
                for (int j = 0; j < back; j++) seen[j][v] = seen[j + 1][v];
            }
        const auto keep = [&] {
            for (int j = 0; j < back; j++)
                for (int v = 0; v < VECTORS; v++) write(old + j * X + v * W, seen[j][v], n - v * W);
        };
        for (int64_t t = begin; t < end; t++) {
            if (t == sure) keep();
            for (int v = 0; v < VECTORS; v++) {
                seen[back][v] = read(x + t * stride + x0 + v * W, n - v * W);
                if (t >= sure) write(note + (t - sure) * X + v * W, seen[back][v], n - v * W);
                vf sum{};
                for (int j = 0; j <= back; j++) sum = fma(w[j][v], seen[j][v], sum);
                write(y + t * X + x0 + v * W, sum + b[v], n - v * W);
                for (int j = 0; j < back; j++) seen[j][v] = seen[j + 1][v];
            }
        }
        if (sure == end) keep();
    });
    return 0;
}

// q, k: tokens of [G, C], v: tokens of [H, P], their strides apart; decay [T, H]; beta [T, H], where J has room for it;
// memory [.., H, C, P]; noted [M, K, J], J = G C + H P + H, or H more with beta; out [T, H, P].
// 1 if a row is none of the M or notes more than K tokens, 2 if keys are too wide.
extern "C" int fn_gated_scan(const float* q, const float* k, const float* v, const float* decay, const float* beta,
                             float* memory, float* noted, const int32_t* row, const int32_t* start,
                             const int32_t* length, const int32_t* behind, const int32_t* guessed, float* out,
                             int64_t R, int64_t M, int64_t K, int64_t J, int64_t G, int64_t H, int64_t C,
                             int64_t P, int64_t q_stride, int64_t k_stride, int64_t v_stride, int threads) {
    using namespace fn;
    if (!inside(row, start, behind, guessed, R, M, K)) return 1;
    if (C > MOST_KEYS) return 2;
    const int64_t strips = (P + STRIP - 1) / STRIP, keys = G * C, values = keys + H * P;
    const bool delta = J > values + H;  // beta may be null where there are no tokens
    each(R * H * strips, start[R] * H * C * P > 1 << 15 ? threads : 1, [&](int64_t i) {
        const int64_t r = i / (H * strips), h = i / strips % H, p0 = i % strips * STRIP, g = h / (H / G);
        const int n = int(P - p0 < STRIP ? P - p0 : STRIP);
        const int64_t begin = start[r], end = start[r + 1], sure = end - guessed[r];
        if (begin == end && !behind[row[r]]) return;
        vf m[MOST_KEYS][VECTORS];  // this strip of the memory, near while all tokens pass
        float* home = memory + ((row[r] * H + h) * C) * P + p0;
        const bool fresh = begin < end && length[r] == end - begin;
        const int64_t before = fresh ? 0 : behind[row[r]];
        for (int64_t c = 0; c < C; c++)
            for (int j = 0; j < VECTORS; j++) m[c][j] = fresh ? vf{} : read(home + c * P + j * W, n - j * W);
        const auto keep = [&] {
            for (int64_t c = 0; c < C; c++)
                for (int j = 0; j < VECTORS; j++) write(home + c * P + j * W, m[c][j], n - j * W);
        };
        for (int64_t t = begin - before; t < end; t++) {
            if (t == sure) keep();
            const bool late = t < begin;  // it was noted
            const float* note = noted + (row[r] * K + (t - begin + before)) * J;
            const float *k_C = (late ? note : k + t * k_stride) + g * C, *q_C = late ? k_C : q + t * q_stride + g * C;
            const float* v_P = (late ? note + keys : v + t * v_stride) + h * P + p0;
            const vf decayed = splat(late ? note[values + h] : decay[t * H + h]);
            vf u[VECTORS], o[VECTORS] = {};
            for (int j = 0; j < VECTORS; j++) u[j] = read(v_P + j * W, n - j * W);
            if (delta) {
                vf known[VECTORS] = {};
                for (int64_t c = 0; c < C; c++)
                    for (int j = 0; j < VECTORS; j++) known[j] = fma(splat(k_C[c]), m[c][j], known[j]);
                const vf rate = splat(late ? note[values + H + h] : beta[t * H + h]);
                for (int j = 0; j < VECTORS; j++) u[j] = (u[j] - known[j] * decayed) * rate;
            }
            for (int64_t c = 0; c < C; c++)
                for (int j = 0; j < VECTORS; j++) {
                    m[c][j] = fma(splat(k_C[c]), u[j], m[c][j] * decayed);
                    o[j] = fma(splat(q_C[c]), m[c][j], o[j]);
                }
            for (int j = 0; j < VECTORS && !late; j++)
                write(out + (t * H + h) * P + p0 + j * W, o[j], n - j * W);
        }
        if (sure == end) keep();
    });
    // Only now: all heads and strips of a row read what was noted before.
    for (int64_t r = 0; r < R; r++)
        for (int64_t t = start[r + 1] - guessed[r], j = 0; t < start[r + 1]; t++, j++) {
            float* note = noted + (row[r] * K + j) * J;
            memcpy(note, k + t * k_stride, sizeof(float) * keys);
            memcpy(note + keys, v + t * v_stride, sizeof(float) * H * P);
            memcpy(note + values, decay + t * H, sizeof(float) * H);
            if (delta) memcpy(note + values + H, beta + t * H, sizeof(float) * H);
        }
    return 0;
}
