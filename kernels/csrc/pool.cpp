// Writing to the paged pool: plain copies.
#include <cstring>

#include "parallel.h"

extern "C" {

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
