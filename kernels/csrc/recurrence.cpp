// Layers with a state: a short convolution over a row's tokens, and a memory that every token changes and reads.
//
// Lanes hold channels that never meet in a sum, and a thread takes some of them through all tokens of a row, one after
// another. So a token's bits do not depend on where a step began, on other rows, or on the number of threads.
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

bool inside(const int32_t* row, const int32_t* start, int64_t R, int64_t S) {
    for (int64_t r = 0; r < R; r++)
        if (row[r] < 0 || row[r] >= S || start[r + 1] < start[r]) return false;
    return true;
}

}  // namespace
}  // namespace fn

// x: rows of X channels, `stride` apart; weight [X, taps]; bias [X] or null; tail [S, taps - 1, X]; y [T, X].
// 1 if a row is none of the states, 2 if there are too many taps.
extern "C" int fn_causal_conv(const float* x, const float* weight, const float* bias, float* tail, const int32_t* row,
                              const int32_t* start, const int32_t* length, float* y, int64_t stride, int64_t R,
                              int64_t S, int64_t X, int64_t taps, int threads) {
    using namespace fn;
    if (!inside(row, start, R, S)) return 1;
    if (taps < 2 || taps > MOST_TAPS) return 2;
    const int64_t strips = (X + STRIP - 1) / STRIP;
    const int back = int(taps) - 1;
    each(R * strips, start[R] * X * taps > 1 << 16 ? threads : 1, [&](int64_t i) {
        const int64_t r = i / strips, x0 = i % strips * STRIP;
        const int n = int(X - x0 < STRIP ? X - x0 : STRIP);
        const int64_t begin = start[r], end = start[r + 1];
        if (begin == end) return;
        vf w[MOST_TAPS][VECTORS], seen[MOST_TAPS][VECTORS], b[VECTORS];
        float* old = tail + row[r] * back * X + x0;
        const bool fresh = length[r] == end - begin;
        for (int j = 0; j <= back; j++) {
            float column[STRIP] = {};
            for (int c = 0; c < n; c++) column[c] = weight[(x0 + c) * taps + j];
            for (int v = 0; v < VECTORS; v++) w[j][v] = load<vf>(column + v * W);
        }
        for (int v = 0; v < VECTORS; v++) b[v] = bias ? read(bias + x0 + v * W, n - v * W) : vf{};
        for (int j = 0; j < back; j++)
            for (int v = 0; v < VECTORS; v++) seen[j][v] = fresh ? vf{} : read(old + j * X + v * W, n - v * W);
        for (int64_t t = begin; t < end; t++) {
            for (int v = 0; v < VECTORS; v++) {
                seen[back][v] = read(x + t * stride + x0 + v * W, n - v * W);
                vf sum{};
                for (int j = 0; j <= back; j++) sum = fma(w[j][v], seen[j][v], sum);
                write(y + t * X + x0 + v * W, sum + b[v], n - v * W);
                for (int j = 0; j < back; j++) seen[j][v] = seen[j + 1][v];
            }
        }
        for (int j = 0; j < back; j++)
            for (int v = 0; v < VECTORS; v++) write(old + j * X + v * W, seen[j][v], n - v * W);
    });
    return 0;
}

// q, k: tokens of [G, C], v: tokens of [H, P], their strides apart; decay [T, H]; beta [T, H] or null; memory [S, H, C, P];
// out [T, H, P].
// 1 if a row is none of the states, 2 if keys are too wide.
extern "C" int fn_gated_scan(const float* q, const float* k, const float* v, const float* decay, const float* beta,
                             float* memory, const int32_t* row, const int32_t* start, const int32_t* length, float* out,
                             int64_t R, int64_t S, int64_t G, int64_t H, int64_t C, int64_t P, int64_t q_stride,
                             int64_t k_stride, int64_t v_stride, int threads) {
    using namespace fn;
    if (!inside(row, start, R, S)) return 1;
    if (C > MOST_KEYS) return 2;
    const int64_t strips = (P + STRIP - 1) / STRIP;
    each(R * H * strips, start[R] * H * C * P > 1 << 15 ? threads : 1, [&](int64_t i) {
        const int64_t r = i / (H * strips), h = i / strips % H, p0 = i % strips * STRIP;
        const int n = int(P - p0 < STRIP ? P - p0 : STRIP);
        const int64_t begin = start[r], end = start[r + 1];
        if (begin == end) return;
        vf m[MOST_KEYS][VECTORS];  // this strip of the memory, near while all tokens pass
        float* home = memory + ((row[r] * H + h) * C) * P + p0;
        const bool fresh = length[r] == end - begin;
        for (int64_t c = 0; c < C; c++)
            for (int j = 0; j < VECTORS; j++) m[c][j] = fresh ? vf{} : read(home + c * P + j * W, n - j * W);
        for (int64_t t = begin; t < end; t++) {
            const int64_t g = h / (H / G);
            const float *q_C = q + t * q_stride + g * C, *k_C = k + t * k_stride + g * C;
            const vf keep = splat(decay[t * H + h]);
            vf u[VECTORS], o[VECTORS] = {};
            for (int j = 0; j < VECTORS; j++) u[j] = read(v + t * v_stride + h * P + p0 + j * W, n - j * W);
            if (beta) {
                vf known[VECTORS] = {};
                for (int64_t c = 0; c < C; c++)
                    for (int j = 0; j < VECTORS; j++) known[j] = fma(splat(k_C[c]), m[c][j], known[j]);
                const vf rate = splat(beta[t * H + h]);
                for (int j = 0; j < VECTORS; j++) u[j] = (u[j] - known[j] * keep) * rate;
            }
            for (int64_t c = 0; c < C; c++)
                for (int j = 0; j < VECTORS; j++) {
                    m[c][j] = fma(splat(k_C[c]), u[j], m[c][j] * keep);
                    o[j] = fma(splat(q_C[c]), m[c][j], o[j]);
                }
            for (int j = 0; j < VECTORS; j++) write(out + (t * H + h) * P + p0 + j * W, o[j], n - j * W);
        }
        for (int64_t c = 0; c < C; c++)
            for (int j = 0; j < VECTORS; j++) write(home + c * P + j * W, m[c][j], n - j * W);
    });
    return 0;
}
