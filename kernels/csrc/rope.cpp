// From a fused projection to attention: heads of q and k normed and rotated, k and v written to the paged pool.
//
// One thread does a token from end to end; sums run over channels in vectors of W and over a vector's lanes pairwise, so
// a token's bits are its own.
#include <cmath>

#include "parallel.h"
#include "simd.h"

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
    if constexpr (sizeof(Element) == 4) return v;
    Element e[W];
    store_float(e, v);
    return load_float(e);
}

// out = rotate(norm(x) * weight), both steps in float, rounded after each; without a weight there is no norm.
void head(const Element* x, const Element* weight, const Turn& t, Element* out) {
    float a[MOST + W];
    vf square{};
    for (int c = 0; c < t.C; c += W) {
        const vf v = read(x + c, t.C - c);
        store(a + c, v);
        square = fma(v, v, square);
    }
    if (weight) {
        const vf scale = splat(1.f / std::sqrt(sum_lanes(square) / float(t.C) + t.eps));
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

}  // namespace
}  // namespace fn

// qkv: T rows, `stride` elements apart, of H + 2 K heads of C channels; cos, sin: [T, half]; norms [C] or null;
// slot[t] is the row of the pools [slots, K, C] that token t goes to; q: [T, H, C]; eps as the bits of a double.
// Returns 0, 1 when a slot lies outside of the pool (nothing is written for it), 2 when a head is too wide.
extern "C" int fn_rope_write(const void* qkv, const void* q_norm, const void* k_norm, const float* cos, const float* sin,
                             void* k_pool, void* v_pool, const int32_t* slot, void* q, int64_t stride, int64_t T,
                             int64_t H, int64_t K, int64_t C, int64_t half, int64_t slots, int64_t eps_bits,
                             int threads) {
    using namespace fn;
    double eps;
    memcpy(&eps, &eps_bits, sizeof eps);
    if (C > MOST) return 2;
    constexpr int64_t CHUNK = 8;  // tokens an item takes
    std::atomic<int> bad{0};
    const auto* in = static_cast<const Element*>(qkv);
    each((T + CHUNK - 1) / CHUNK, T * (H + 2 * K) * C > 1 << 16 ? threads : 1, [&](int64_t i) {
        for (int64_t t = i * CHUNK; t < T && t < (i + 1) * CHUNK; t++) {
            if (slot[t] < 0 || slot[t] >= slots) {
                bad = 1;
                continue;
            }
            const Turn turn{cos + t * half, sin + t * half, int(C), int(half), float(eps)};
            const Element* x = in + t * stride;
            for (int64_t h = 0; h < H; h++)
                head(x + h * C, static_cast<const Element*>(q_norm), turn, static_cast<Element*>(q) + (t * H + h) * C);
            Element *k = static_cast<Element*>(k_pool) + slot[t] * K * C, *v = static_cast<Element*>(v_pool) + slot[t] * K * C;
            for (int64_t h = 0; h < K; h++)
                head(x + (H + h) * C, static_cast<const Element*>(k_norm), turn, k + h * C);
            memcpy(v, x + (H + K) * C, sizeof(Element) * K * C);
        }
    });
    return bad;
}
