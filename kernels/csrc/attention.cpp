// Attention over the paged pool, for any mixture of prefill and decode, with one order of arithmetic for both.
//
// KV is walked in tiles of TILE tokens that start at multiples of TILE in the sequence. For each (query, head):
//
//     score[j]  = q . k[j]                       summed over channels from 0 up, in one lane
//     m, l, o   = online softmax over the tiles, in order; within a tile over tokens from 0 up
//
// A lane holds one token (scores) or one channel (output), never a part of a sum, so how many queries are done
// together, who does them and what else is in the batch cannot change a bit. Tokens that a query does not see get
// the weight 0, and adding 0 * v leaves a sum as it was.
//
// Rows that begin with the same blocks (a shared prefix) read the tiles of these blocks once: all their queries go over
// them together, which leaves (m, l, o) of each as it would have been after those tiles, and every row goes on alone.
//
// K is packed channel-major (tokens in lanes), V token-major, both in "atoms" of 32 bits: a float, or with AVX512-BF16
// a pair of bfloat16 (two channels of K, two tokens of V), which one instruction multiplies and adds.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "parallel.h"
#include "tiles.h"

namespace fn {
namespace {

constexpr int QUERY_ROWS = 96;  // (query, head) pairs that share one packing of a KV tile

// ---- one piece of work ----------------------------------------------------------------------------------------------

struct Call {
    const void *q, *k, *v;
    void* out;
    const int32_t *table, *row, *start, *length;
    int64_t q_stride, R, P, N;
    int B, H, K, C, window, rows;  // rows: of the table
    float scale;
};

struct State {  // of the queries of a row that has read the tiles it shares: (KV head, query, head of the group)
    Running* run;
    float* out;
};

struct Item {  // queries [from, to) of batch row r, KV heads [head, head_end), tiles from token `begin` on
    int r, from, to, head, head_end;
    int64_t begin;
    const State* state;  // where they stand at `begin`, or null: nothing was read
};

struct Group {  // short rows members[0 .. count) that share their first `tokens` tokens, whole tiles
    const int* members;
    int count;
    int64_t tokens;
};

// First token of the first tile that some query of the item sees.
FN_INLINE int64_t first_tile(const Call& a, int r, int from) {
    const int64_t position = a.length[r] - (a.start[r + 1] - from);
    return a.window > 0 && position >= a.window ? (position - a.window + 1) / TILE * TILE : 0;
}

// Where the KV of the tile's tokens [t, end) begins in the pool, for the item's first head; returns how many they are.
FN_INLINE int place(const Call& a, const Item& it, int64_t t, int64_t end, int64_t* offset) {
    const int count = int(end - t < TILE ? end - t : TILE);
    const int32_t* table = a.table + int64_t(a.row[it.r]) * a.P;
    for (int j = 0; j < count; j++) {
        const int64_t column = (t + j) / a.B, block = table[column < a.P ? column : a.P - 1];
        offset[j] = ((block * a.B + (t + j) % a.B) * a.K + it.head) * a.C;
    }
    return count;
}

struct Scratch {
    uint32_t *keys, *values, *query, *weight;
    float *score, *out, *factor;
    Running* run;
    int64_t *offset, *next;
};

FN_INLINE size_t line(size_t n) { return (n + 63) & ~size_t(63); }

struct Arena {  // a thread's scratch memory, kept between calls
    char* memory = nullptr;
    size_t size = 0;
    ~Arena() { free(memory); }
    char* reserve(size_t n) {
        if (n > size) {
            free(memory);
            memory = static_cast<char*>(aligned_alloc(64, line(n)));
            size = n;
        }
        return memory;
    }
};

Scratch lay_out(int rows, int C, int width) {
    static thread_local Arena arena;
    const size_t sizes[] = {size_t(C) * TILE * 4,    size_t(TILE) * width * 4, size_t(rows) * C * 4,
                            size_t(rows) * TILE * 4, size_t(rows) * TILE * 4,  size_t(rows) * width * 4,
                            size_t(rows) * 4,        sizeof(Running) * rows,   size_t(TILE) * 8,
                            size_t(TILE) * 8};
    char* at[10];
    size_t sum = 0;
    for (size_t n : sizes) sum += line(n) + 64;
    char* p = arena.reserve(sum);
    if (!p) abort();
    for (int i = 0; i < 10; i++) at[i] = p, p += line(sizes[i]) + 64;  // + 64 staggers the buffers over cache sets
    return {(uint32_t*)at[0], (uint32_t*)at[1], (uint32_t*)at[2], (uint32_t*)at[3], (float*)at[4],
            (float*)at[5],    (float*)at[6],    (Running*)at[7],  (int64_t*)at[8],
            (int64_t*)at[9]};
}

template <class T, bool PAIR>
FN_INLINE void load_query(const T* from, int C, uint32_t* to) {
    if constexpr (PAIR) {
        to[(C + 1) / 2 - 1] = 0;
        memcpy(to, from, sizeof(T) * C);
    } else {
        int c = 0;
        for (; c + W <= C; c += W) store(to + c, load_float(from + c));
        if (c < C) {
            vf tail = load_float_part(from + c, C - c);
            memcpy(to + c, &tail, sizeof(float) * (C - c));
        }
    }
}

// The tiles that the rows of a group share, for all their queries and one KV head; where each then stands goes to its
// row's state. Every query sees every token of these tiles.
template <class T, bool PAIR>
void attend_shared(const Call& a, const Group& group, int head, const State* states) {
    constexpr int PER = PAIR ? 2 : 1;
    const int G = a.H / a.K, C = a.C, atoms = (C + PER - 1) / PER, width = (C + W - 1) / W * W;
    int rows = 0;
    for (int i = 0; i < group.count; i++) rows += (a.start[group.members[i] + 1] - a.start[group.members[i]]) * G;
    Scratch s = lay_out(rows, C, width);
    int m = 0;
    for (int i = 0; i < group.count; i++)
        for (int t = a.start[group.members[i]]; t < a.start[group.members[i] + 1]; t++)
            for (int g = 0; g < G; g++, m++) {
                const T* q = static_cast<const T*>(a.q) + t * a.q_stride + (head * G + g) * C;
                load_query<T, PAIR>(q, C, s.query + m * atoms);
                s.run[m] = {NONE, vf{}};
            }
    memset(s.out, 0, sizeof(float) * rows * width);

    const Item first{group.members[0], 0, 0, head, head + 1, 0, nullptr};
    place(a, first, 0, TILE, s.offset);
    for (int64_t t = 0; t < group.tokens; t += TILE) {
        if (t > 0) memcpy(s.offset, s.next, sizeof(int64_t) * TILE);
        const int coming = t + TILE < group.tokens ? place(a, first, t + TILE, t + 2 * TILE, s.next) : 0;
        Ahead ahead(a.k, a.v, s.next, coming, sizeof(T), C);
        pack_keys<T, PAIR>(static_cast<const T*>(a.k), s.offset, TILE, C, s.keys, ahead);
        multiply<PAIR>(s.query, atoms, s.keys, TILE, s.score, TILE, rows, TILE / W, atoms, nullptr);
        for (int i = 0; i < rows; i++)
            s.factor[i] = weigh<PAIR>(s.score + i * TILE, s.weight + i * (TILE / PER), TILE / W, 0, TILE, a.scale, s.run[i]);
        pack_values<T, PAIR>(static_cast<const T*>(a.v), s.offset, TILE, C, width, s.values, ahead);
        multiply<PAIR>(s.weight, TILE / PER, s.values, width, s.out, width, rows, width / W, TILE / PER, s.factor);
    }
    m = 0;
    for (int i = 0; i < group.count; i++) {
        const int r = group.members[i], n = (a.start[r + 1] - a.start[r]) * G;
        memcpy(states[r].run + head * n, s.run + m, sizeof(Running) * n);
        memcpy(states[r].out + head * n * width, s.out + m * width, sizeof(float) * n * width);
        m += n;
    }
}

// Rows of scratch are numbered (KV head, query, head of the group); queries are in order, so those that see a tile
// are a contiguous range of each KV head's rows.
template <class T, bool PAIR>
void attend(const Call& a, const Item& it, const Item* next) {
    constexpr int PER = PAIR ? 2 : 1;
    const int G = a.H / a.K, C = a.C, atoms = (C + PER - 1) / PER, width = (C + W - 1) / W * W;
    const int n = it.to - it.from, heads = it.head_end - it.head, group = n * G;
    const int64_t length = a.length[it.r];
    const int64_t position = length - (a.start[it.r + 1] - it.from);  // of the first query
    const int64_t end = position + n;                                // of KV that some query sees
    const T* q = static_cast<const T*>(a.q);
    Scratch s = lay_out(heads * group, C, width);

    for (int h = 0; h < heads; h++)
        for (int i = 0; i < n; i++)
            for (int g = 0; g < G; g++) {
                const int m = h * group + i * G + g;
                load_query<T, PAIR>(q + (it.from + i) * a.q_stride + ((it.head + h) * G + g) * C, C, s.query + m * atoms);
                s.run[m] = {NONE, vf{}};
            }
    if (it.state) {
        memcpy(s.run, it.state->run + it.head * group, sizeof(Running) * heads * group);
        memcpy(s.out, it.state->out + it.head * group * width, sizeof(float) * heads * group * width);
    } else {
        memset(s.out, 0, sizeof(float) * heads * group * width);
    }

    const int64_t begin = it.begin;
    place(a, it, begin, end, s.offset);
    for (int64_t t = begin; t < end; t += TILE) {
        const int count = int(end - t < TILE ? end - t : TILE), vectors = (count + W - 1) / W;
        // queries [lo, hi) see some of the tile
        const int lo = t > position ? int(t - position) : 0;
        int hi = n;
        if (a.window > 0 && t + TILE - 1 + a.window - position < n) hi = int(t + TILE - 1 + a.window - position);
        if (t > begin) memcpy(s.offset, s.next, sizeof(int64_t) * count);
        int coming = 0;  // tokens of what is to be read next: this item's next tile, or the next item's first
        if (t + TILE < end)
            coming = place(a, it, t + TILE, end, s.next);
        else if (next)
            coming = place(a, *next, next->begin, a.length[next->r], s.next);
        Ahead ahead(a.k, a.v, s.next, coming, sizeof(T), heads * C);
        for (int h = 0; h < heads; h++) {
            const T *k = static_cast<const T*>(a.k) + h * C, *v = static_cast<const T*>(a.v) + h * C;
            const int m = h * group + lo * G, rows = (hi - lo) * G;
            const uint32_t *query = s.query + m * atoms, *weight = s.weight + m * (TILE / PER);
            float *score = s.score + m * TILE, *out = s.out + m * width, *factor = s.factor + m;
            const bool few = rows <= FEW && C % (NVF * W) == 0;
            if (few) {
                switch (rows) {
                    case 1: score_few<T, PAIR, 1>(k, s.offset, count, C, query, atoms, score, ahead); break;
                    case 2: score_few<T, PAIR, 2>(k, s.offset, count, C, query, atoms, score, ahead); break;
                    case 3: score_few<T, PAIR, 3>(k, s.offset, count, C, query, atoms, score, ahead); break;
                    case 4: score_few<T, PAIR, 4>(k, s.offset, count, C, query, atoms, score, ahead); break;
                }
            } else {
                pack_keys<T, PAIR>(k, s.offset, count, C, s.keys, ahead);
                multiply<PAIR>(query, atoms, s.keys, TILE, score, TILE, rows, vectors, atoms, nullptr);
            }
            for (int i = 0; i < rows; i++) {
                const int64_t at = position + lo + i / G;
                const int last = at + 1 - t < count ? int(at + 1 - t) : count;
                const int first = a.window > 0 && at - a.window + 1 > t ? int(at - a.window + 1 - t) : 0;
                factor[i] = weigh<PAIR>(score + i * TILE, s.weight + (m + i) * (TILE / PER), vectors, first, last,
                                        a.scale, s.run[m + i]);
            }
            if (few) {
                switch (rows) {
                    case 1: sum_few<T, PAIR, 1>(v, s.offset, count, C, weight, out, width, factor, ahead); break;
                    case 2: sum_few<T, PAIR, 2>(v, s.offset, count, C, weight, out, width, factor, ahead); break;
                    case 3: sum_few<T, PAIR, 3>(v, s.offset, count, C, weight, out, width, factor, ahead); break;
                    case 4: sum_few<T, PAIR, 4>(v, s.offset, count, C, weight, out, width, factor, ahead); break;
                }
            } else {
                pack_values<T, PAIR>(v, s.offset, count, C, width, s.values, ahead);
                multiply<PAIR>(weight, TILE / PER, s.values, width, out, width, rows, width / W,
                               (count + PER - 1) / PER, factor);
            }
        }
    }

    T* out = static_cast<T*>(a.out);
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < n; i++)
            for (int g = 0; g < G; g++) {
                const int m = h * group + i * G + g;
                T* to = out + (int64_t(it.from + i) * a.H + (it.head + h) * G + g) * C;
                const vf inverse = splat(1.f / sum_lanes(s.run[m].total));
                for (int c = 0; c < C; c += W) {
                    vf o = load<vf>(s.out + m * width + c) * inverse;
                    if (C - c >= W) {
                        store_float(to + c, o);
                    } else {
                        T tail[W];
                        store_float(tail, o);
                        memcpy(to + c, tail, sizeof(T) * (C - c));
                    }
                }
            }
}

// ---- sharing out the work -------------------------------------------------------------------------------------------

// How many tokens, in whole tiles, rows r and s have in common from their beginning on and see with every query.
int64_t common(const Call& a, int r, int s) {
    const int32_t *x = a.table + int64_t(a.row[r]) * a.P, *y = a.table + int64_t(a.row[s]) * a.P;
    const int64_t see_x = a.length[r] - (a.start[r + 1] - a.start[r]), see_y = a.length[s] - (a.start[s + 1] - a.start[s]);
    const int64_t most = (see_x < see_y ? see_x : see_y) / TILE * TILE;
    int64_t p = 0;
    while (p * a.B < most && p < a.P && x[p] == y[p]) p++;
    const int64_t tokens = p * a.B < most ? p * a.B : most;
    return tokens / TILE * TILE;
}

// Short rows that begin with the same tile, in groups of at most QUERY_ROWS (query, head) pairs; `members` and `groups`
// have room for one entry a row. Returns how many groups there are.
int find_groups(const Call& a, int few, int* members, Group* groups) {
    int count = 0, found = 0;
    for (int r = 0; r < a.R; r++) {
        const int n = a.start[r + 1] - a.start[r];
        if (n > 0 && n <= few && a.length[r] - n >= TILE) members[count++] = r;
    }
    const auto first = [&](int r) { return a.table[int64_t(a.row[r]) * a.P]; };
    std::stable_sort(members, members + count, [&](int r, int s) { return first(r) < first(s); });
    for (int i = 0; i < count;) {
        Group g{members + i, 1, 0};
        int pairs = (a.start[members[i] + 1] - a.start[members[i]]) * (a.H / a.K);
        for (int j = i + 1; j < count && first(members[j]) == first(members[i]); j++) {
            const int more = (a.start[members[j] + 1] - a.start[members[j]]) * (a.H / a.K);
            const int64_t tokens = common(a, members[i], members[j]);
            if (tokens == 0 || pairs + more > QUERY_ROWS) break;
            g.tokens = g.count == 1 || tokens < g.tokens ? tokens : g.tokens;
            g.count++, pairs += more;
        }
        if (g.count > 1) groups[found++] = g;
        i += g.count;
    }
    return found;
}

// A row with few queries is one item (all KV heads: its KV is read front to back once), split by heads only when there
// are fewer rows than threads can share; a row with many is split by KV head and into tiles of queries.
template <class T, bool PAIR>
void attend_all(const Call& a, int threads) {
    const int G = a.H / a.K, tile = QUERY_ROWS / G > 0 ? QUERY_ROWS / G : 1, few = 4, width = (a.C + W - 1) / W * W;
    int64_t work = 0;  // KV tokens read, weighted by the queries that read them
    for (int64_t r = 0; r < a.R; r++) work += int64_t(a.start[r + 1] - a.start[r]) * a.length[r];
    if (work * a.H * a.C < 1 << 18) threads = 1;
    int64_t short_rows = 0, queries = 0;
    for (int64_t r = 0; r < a.R; r++) {
        const int n = a.start[r + 1] - a.start[r];
        if (n <= few) short_rows++, queries += n;
    }
    int parts = 1;  // that the KV heads of a short row fall into
    while (threads > 1 && short_rows * parts < 4 * threads && parts < a.K) parts++;

    std::vector<int> members(a.R);
    std::vector<Group> groups(a.R);
    std::vector<State> states(a.R, State{nullptr, nullptr});
    std::vector<int64_t> shared(a.R, 0);
    const int found = a.window > 0 ? 0 : find_groups(a, few, members.data(), groups.data());
    if (found) {
        static thread_local Arena arena;
        const size_t each_run = line(sizeof(Running) * queries * a.H);
        char* memory = arena.reserve(each_run + line(sizeof(float) * queries * a.H * width));
        if (!memory) abort();
        int64_t at = 0;
        for (int i = 0; i < found; i++)
            for (int j = 0; j < groups[i].count; j++) {
                const int r = groups[i].members[j];
                states[r] = {(Running*)memory + at, (float*)(memory + each_run) + at * width};
                shared[r] = groups[i].tokens;
                at += int64_t(a.start[r + 1] - a.start[r]) * a.H;
            }
        fn::each(int64_t(found) * a.K, threads, [&](int64_t i) {
            attend_shared<T, PAIR>(a, groups[i / a.K], int(i % a.K), states.data());
        });
    }

    std::vector<Item> items;
    for (int pass = 0; pass < 2; pass++)  // long rows first, so that no thread ends with a large item
        for (int r = 0; r < a.R; r++) {
            const int from = a.start[r], to = a.start[r + 1], n = to - from;
            if (n == 0 || (n > few) != (pass == 0)) continue;
            if (n <= few) {
                const int64_t begin = states[r].run ? shared[r] : first_tile(a, r, from);
                for (int p = 0; p < parts; p++)
                    items.push_back({r, from, to, a.K * p / parts, a.K * (p + 1) / parts, begin,
                                     states[r].run ? &states[r] : nullptr});
            } else {
                for (int i = (n - 1) / tile * tile; i >= 0; i -= tile)  // later queries see more
                    for (int h = 0; h < a.K; h++)
                        items.push_back({r, from + i, from + (i + tile < n ? i + tile : n), h, h + 1,
                                         first_tile(a, r, from + i), nullptr});
            }
        }
    const int64_t total = int64_t(items.size());
    each(total, threads, [&](int64_t i) {  // the next item of this thread is most likely i + threads
        attend<T, PAIR>(a, items[i], i + threads < total ? &items[i + threads] : nullptr);
    });
}

}  // namespace
}  // namespace fn

// All of the library's element type. q_stride in elements, heads and channels of q contiguous; scale as the bits of a
// double.
// Returns 0, or 1 when a row or block lies outside of its array or a length is too small (nothing is computed then).
extern "C" int fn_paged_attention(const void* q, const void* k, const void* v, void* out, const int32_t* table,
                                  const int32_t* row, const int32_t* start, const int32_t* length, int64_t q_stride,
                                  int64_t R, int64_t M, int64_t P, int64_t N, int64_t B, int64_t H, int64_t K, int64_t C,
                                  int64_t scale_bits, int64_t window, int threads) {
    using namespace fn;
    double scale;
    memcpy(&scale, &scale_bits, sizeof scale);
    for (int64_t r = 0; r < R; r++) {
        const int64_t n = start[r + 1] - start[r];
        if (n == 0) continue;
        if (n < 0 || row[r] < 0 || row[r] >= M || length[r] < n) return 1;
        const int64_t first = length[r] - n - window + 1;
        for (int64_t p = window > 0 && first > 0 ? first / TILE * TILE / B : 0; p * B < length[r] && p < P; p++) {
            const int32_t block = table[row[r] * P + p];
            if (block < 0 || block >= N) return 1;
        }
    }
    const Call a{q,        k, v, out, table,  row,    start,  length,      q_stride,   R,
                 P,        N, int(B), int(H), int(K), int(C), int(window), int(M), float(scale)};
    attend_all<Element, PAIRS>(a, threads);
    return 0;
}
