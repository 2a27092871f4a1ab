// Writing to the paged pool: plain copies.
#include <cstring>

#include "parallel.h"

extern "C" {

// k, v: `tokens` rows of `bytes`, k_stride and v_stride bytes apart; slot[t] is the row of the pools that t goes to.
// Returns 0, or 1 when a slot lies outside of the pool (nothing is written for it).
int fn_kv_write(const char* k, const char* v, char* k_pool, char* v_pool, const int32_t* slot, int64_t tokens,
                int64_t k_stride, int64_t v_stride, int64_t bytes, int64_t slots, int threads) {
    constexpr int64_t CHUNK = 32;  // tokens an item copies
    std::atomic<int> bad{0};
    fn::each((tokens + CHUNK - 1) / CHUNK, tokens * bytes > 65536 ? threads : 1, [&](int64_t i) {
        for (int64_t t = i * CHUNK; t < tokens && t < (i + 1) * CHUNK; t++) {
            if (slot[t] < 0 || slot[t] >= slots) {
                bad = 1;
                continue;
            }
            memcpy(k_pool + slot[t] * bytes, k + t * k_stride, bytes);
            memcpy(v_pool + slot[t] * bytes, v + t * v_stride, bytes);
        }
    });
    return bad;
}

// pools: `n` addresses of pools of `blocks` blocks, bytes[i] bytes a block in pool i; pairs: (source, target) blocks.
int fn_copy_blocks(char* const* pools, const int64_t* bytes, int64_t n, const int32_t* pairs, int64_t count,
                   int64_t blocks, int threads) {
    for (int64_t c = 0; c < 2 * count; c++)
        if (pairs[c] < 0 || pairs[c] >= blocks) return 1;
    fn::each(n, n * count > 4 ? threads : 1, [&](int64_t i) {
        for (int64_t c = 0; c < count; c++)
            if (pairs[2 * c] != pairs[2 * c + 1])
                memcpy(pools[i] + pairs[2 * c + 1] * bytes[i], pools[i] + pairs[2 * c] * bytes[i], bytes[i]);
    });
    return 0;
}
}
