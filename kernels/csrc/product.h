// What the products (linear.cpp, quantized.cpp) have in common: a weight in panels, who walks them, how sums leave.
//
// A panel is PANEL rows of the weight (columns of y), read front to back once for as many rows of x as registers hold
// sums for, NV vectors of columns at a time.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace fn {
namespace {

constexpr int PANEL = 32;
constexpr int NV = 2;

// Bytes of the weight asked for before they are needed, by rows and multiplications of a row to a cache line: near where
// memory is the limit, so that the hardware's own prefetch is not led astray, and far where multiplying is.
template <int R, int MULTIPLIES>
constexpr int AHEAD = R * MULTIPLIES <= 4 ? 1024 : 4096;

struct Result {
    const void* bias;  // [N] elements, or null
    void* y;
    int64_t N, stride;  // elements from one row of y to the next
    bool wide;          // y is of floats whatever the element type
};

template <class Y>
FN_INLINE void put(Y* y, vf v, int64_t columns) {
    if (columns >= W) {
        store_float(y, v);
    } else if (columns > 0) {
        Y part[W];
        store_float(part, v);
        memcpy(y, part, sizeof(Y) * columns);
    }
}

// Sums of `count` rows from row m on and of the columns from n on, plus bias, rounded once, whatever there may be. A function
// of its own, so that it is compiled once and not for every number of rows.
template <class T>
__attribute__((noinline)) void leave_any(const vf (*sum)[NV], int count, const Result& out, int64_t m, int64_t n) {
    const T* bias = static_cast<const T*>(out.bias);
    for (int i = 0; i < count; i++) {
        const int64_t row = (m + i) * out.stride;
        for (int j = 0; j < NV; j++) {
            const int64_t c = n + j * W, columns = out.N - c;
            vf v = sum[i][j];
            if (bias && columns > 0) v = v + (columns >= W ? load_float(bias + c) : load_float_part(bias + c, int(columns)));
            if (out.wide)
                put(static_cast<float*>(out.y) + row + c, v, columns);
            else
                put(static_cast<T*>(out.y) + row + c, v, columns);
        }
    }
}

// The same of `count` <= R rows, from registers where that is simple.
template <class T, int R>
FN_INLINE void leave(const vf (&sum)[R][NV], int count, const Result& out, int64_t m, int64_t n) {
    if (out.bias || out.wide || n + NV * W > out.N) return leave_any<T>(sum, count, out, m, n);
    T* y = static_cast<T*>(out.y) + m * out.stride + n;
#pragma GCC unroll 16
    for (int i = 0; i < R; i++, y += out.stride) {
        if (i >= count) break;
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store_float(y + j * W, sum[i][j]);
    }
}

// Calls body(panel, first vector, first row, rows) for every panel, NV vectors and at most MR of M rows. Only the first
// rows find a panel in memory; the later ones find it in the cache and ask for what they have just read, which costs
// nothing.
template <int MR, class Body>
void walk(int64_t M, int64_t N, int64_t K, int threads, const Body& body) {
    if (M * N * K < 1 << 18) threads = 1;
    each_near((N + PANEL - 1) / PANEL, threads, [&](int64_t panel) {
        for (int64_t m = 0; m < M; m += MR)
            for (int v = 0; v < PANEL / W; v += NV) body(panel, v, m, int(M - m < MR ? M - m : MR));
    });
}

}  // namespace
}  // namespace fn
