// Attention over the paged pool, for any mixture of prefill and decode, with one order of arithmetic for both.
//
// KV is walked in tiles of TILE tokens that start at multiples of TILE in the sequence. For each (query, head):
//
//     score[j]  = q . k[j]                       summed over channels from 0 up, in one lane
//     m, l, o   = online softmax over the tiles, in order; within a tile over tokens from 0 up; a sink, which is a
//                 logit without a value, comes before the first
//
// A lane holds one token (scores) or one channel (output), never a part of a sum, so how many queries are done
// together, who does them and what else is in the batch cannot change a bit. Tokens that a query does not see get
// the weight 0, and adding 0 * v leaves a sum as it was.
//
// Rows that begin with the same blocks (a shared prefix) read the tiles of these blocks once: all their queries go over
// them together, which leaves (m, l, o) of each as it would have been after those tiles, and every row goes on alone.
//
// K and V are multiplied where they lie (`pool.h`): nothing is transposed or packed.
//
// Where KV is rounded to 8 bits, queries and a tile's weights (times the scales of V) are rounded to 16 against the largest
// of their row, and the sums over channels and over a tile's tokens are exact ones of integers.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "tiles.h"

namespace fn {
namespace {

constexpr int QUERY_ROWS = 96;  // (query, head) pairs that go over a KV tile together

// ---- one piece of work ----------------------------------------------------------------------------------------------

struct Call {
    const Element* q;
    const Code *k, *v;
    const Element* sink;  // one a query head, or null
    Element* out;
    const int32_t *table, *row, *start, *length;
    int64_t q_stride, R, P, N;
    int H, K, C, window;
    float scale, cap;
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

// The tile of tokens [t, end) of batch row r; columns beyond the table, where only padding goes, are its last.
FN_INLINE Tile place(const Call& a, int r, int head, int64_t t, int64_t end) {
    Tile tile;
    tile.count = int(end - t < TILE ? end - t : TILE);
    const Layout pool{a.K, a.C};
    const int32_t* table = a.table + int64_t(a.row[r]) * a.P;
    for (int p = 0; p < tile.blocks(); p++) {
        const int64_t column = t / BLOCK + p, block = table[column < a.P ? column : a.P - 1];
        tile.k[p] = a.k + pool.k(block, head);
        tile.v[p] = a.v + pool.v(block, head);
    }
    return tile;
}

FN_INLINE Ahead coming(const Tile& tile, int C) {
    Ahead ahead;
    for (int p = 0; p < tile.blocks(); p++) ahead.add(tile.k[p], HEAD + BLOCK * C * sizeof(Code));
    for (int p = 0; p < tile.blocks(); p++) ahead.add(tile.v[p], HEAD + BLOCK * C * sizeof(Code));
    return ahead;
}

struct Rows {  // of `rows` (query, head) pairs
    uint32_t *query, *weight, *odd;
    float *score, *out, *factor, *query_unit, *weight_unit;  // units: of integers, where KV is rounded
    Running* run;
};

FN_INLINE int whole(int channels) { return (channels + W - 1) / W * W; }
FN_INLINE int atoms_of(int channels) { return (channels + PER - 1) / PER; }

Rows lay_out(int rows, int C) {
    static thread_local Scratch scratch;
    const size_t n = rows, sizes[] = {n * atoms_of(C) * 4, n * TILE * 4, size_t(C) * 4,      n * TILE * 4,
                                      n * whole(C) * 4,    n * 4,        n * 4,               n * 4,
                                      sizeof(Running) * n};
    char* at[9];
    size_t sum = 0;
    for (size_t size : sizes) sum += line(size) + 64;
    char* p = scratch.reserve(sum);
    for (int i = 0; i < 9; i++) at[i] = p, p += line(sizes[i]) + 64;  // + 64 staggers the buffers over cache sets
    return {(uint32_t*)at[0], (uint32_t*)at[1], (uint32_t*)at[2], (float*)at[3],
            (float*)at[4],    (float*)at[5],    (float*)at[6],    (float*)at[7],
            (Running*)at[8]};
}

// The queries of tokens [from, to) with one KV head, as rows m and up of scratch: (query, head of the group).
void load_queries(const Call& a, int from, int to, int head, const Rows& s, int m) {
    const int G = a.H / a.K, C = a.C, atoms = atoms_of(C);
    for (int t = from; t < to; t++)
        for (int g = 0; g < G; g++, m++) {
            const Element* q = a.q + t * a.q_stride + (head * G + g) * C;
            uint32_t* to = s.query + m * atoms;
            if constexpr (ROUNDED) {
                vf largest{};
                for (int c = 0; c < C; c += W) {
                    const vf x = C - c < W ? load_float_part(q + c, C - c) : load_float(q + c);
                    largest = max(largest, max(x, -x));
                }
                const float most = max_lane(largest), inverse = most < LEAST ? 0 : 32767.f / most;
                s.query_unit[m] = most < LEAST ? 0 : most / 32767.f;
                to[atoms - 1] = 0;
                for (int c = 0; c < C; c += W) {
                    const vf x = C - c < W ? load_float_part(q + c, C - c) : load_float(q + c);
                    const vh code = narrow((vu)nearest(x * splat(inverse)));
                    memcpy((uint16_t*)to + c, &code, sizeof(uint16_t) * (C - c < W ? C - c : W));
                }
            } else if constexpr (PAIRS) {
                to[atoms - 1] = 0;
                memcpy(to, q, sizeof(Element) * C);
            } else {
                for (int c = 0; c < C; c += W) {
                    const vf x = C - c < W ? load_float_part(q + c, C - c) : load_float(q + c);
                    memcpy(to + c, &x, sizeof(float) * (C - c < W ? C - c : W));
                }
            }
            s.run[m] = {NONE, vf{}};
            if (a.sink) s.run[m] = {load_float_part(a.sink + head * G + g, 1)[0], vf{1.f}};
        }
}

struct Span {  // [first, last): the tokens of a tile that a query sees
    int first, last;
};

// Rows [m, m + rows) of scratch go over a tile; row i sees the tokens seen(i) of it.
template <class Seen>
FN_INLINE void read_tile(const Call& a, const Tile& tile, const Rows& s, int m, int rows, const Seen& seen, Ahead ahead) {
    const int C = a.C, atoms = atoms_of(C), vectors = (tile.count + W - 1) / W;
    float *score = s.score + m * TILE, *factor = s.factor + m, *unit = s.weight_unit + m;
    uint32_t* weight = s.weight + m * (TILE / PER);
    multiply(s.query + m * atoms, atoms, Keys{tile, atoms}, score, TILE, rows, vectors * W,
             Scales{nullptr, s.query_unit + m}, ahead);
    for (int i = 0; i < rows; i++) {
        const Span span = seen(i);
        factor[i] = weigh(score + i * TILE, weight + i * (TILE / PER), tile, span.first, span.last, a.scale, a.cap,
                          s.run[m + i], unit[i]);
    }
    multiply(weight, TILE / PER, Values(tile, C, s.odd), s.out + m * whole(C), whole(C), rows, C, Scales{factor, unit}, ahead);
}

// The tiles that the rows of a group share, for all their queries and one KV head; where each then stands goes to its
// row's state. Every query sees every token of these tiles.
void attend_shared(const Call& a, const Group& group, int head, const State* states) {
    const int G = a.H / a.K, width = whole(a.C);
    int rows = 0;
    for (int i = 0; i < group.count; i++) rows += (a.start[group.members[i] + 1] - a.start[group.members[i]]) * G;
    Rows s = lay_out(rows, a.C);
    int m = 0;
    for (int i = 0; i < group.count; i++) {
        const int from = a.start[group.members[i]], to = a.start[group.members[i] + 1];
        load_queries(a, from, to, head, s, m);
        m += (to - from) * G;
    }
    memset(s.out, 0, sizeof(float) * rows * width);

    Tile tile = place(a, group.members[0], head, 0, TILE);
    for (int64_t t = 0; t < group.tokens; t += TILE) {
        Tile next = tile;
        next.count = 0;
        if (t + TILE < group.tokens) next = place(a, group.members[0], head, t + TILE, group.tokens);
        read_tile(a, tile, s, 0, rows, [](int) { return Span{0, TILE}; }, coming(next, a.C));
        tile = next;
    }
    m = 0;
    for (int i = 0; i < group.count; i++) {
        const int r = group.members[i], n = (a.start[r + 1] - a.start[r]) * G;
        memcpy(states[r].run + head * n, s.run + m, sizeof(Running) * n);
        memcpy(states[r].out + head * n * width, s.out + m * width, sizeof(float) * n * width);
        m += n;
    }
}

// Queries are in order, so those that see a tile are a contiguous range of each KV head's rows of scratch, which are
// numbered (KV head, query, head of the group).
void attend(const Call& a, const Item& it, const Item* next_item) {
    const int G = a.H / a.K, C = a.C, width = whole(C), n = it.to - it.from, rows = n * G, heads = it.head_end - it.head;
    const int64_t position = a.length[it.r] - (a.start[it.r + 1] - it.from);  // of the first query
    const int64_t end = position + n;                                        // of KV that some query sees
    Rows s = lay_out(heads * rows, C);
    for (int h = 0; h < heads; h++) load_queries(a, it.from, it.to, it.head + h, s, h * rows);
    if (it.state) {
        memcpy(s.run, it.state->run + it.head * rows, sizeof(Running) * heads * rows);
        memcpy(s.out, it.state->out + it.head * rows * width, sizeof(float) * heads * rows * width);
    } else {
        memset(s.out, 0, sizeof(float) * heads * rows * width);
    }

    for (int64_t t = it.begin; t < end; t += TILE) {
        // queries [lo, hi) see some of the tile
        const int lo = t > position ? int(t - position) : 0;
        int hi = n;
        if (a.window > 0 && t + TILE - 1 + a.window - position < n) hi = int(t + TILE - 1 + a.window - position);
        for (int h = 0; h < heads; h++) {
            const Tile tile = place(a, it.r, it.head + h, t, end);
            Tile next = tile;
            next.count = 0;  // what is to be read next: another head, this item's next tile, or the next item's first
            if (h + 1 < heads)
                next = place(a, it.r, it.head + h + 1, t, end);
            else if (t + TILE < end)
                next = place(a, it.r, it.head, t + TILE, end);
            else if (next_item)
                next = place(a, next_item->r, next_item->head, next_item->begin, a.length[next_item->r]);
            const auto seen = [&](int i) {
                const int64_t at = position + lo + i / G;
                return Span{a.window > 0 && at - a.window + 1 > t ? int(at - a.window + 1 - t) : 0,
                            at + 1 - t < tile.count ? int(at + 1 - t) : tile.count};
            };
            read_tile(a, tile, s, h * rows + lo * G, (hi - lo) * G, seen, coming(next, C));
        }
    }

    for (int h = 0; h < heads; h++)
        for (int i = 0; i < rows; i++) {
            const float* sum = s.out + (h * rows + i) * width;
            Element* to = a.out + (int64_t(it.from + i / G) * a.H + (it.head + h) * G + i % G) * C;
            const vf inverse = splat(1.f / sum_lanes(s.run[h * rows + i].total));
            for (int c = 0; c < C; c += W) {
                const vf o = load<vf>(sum + c) * inverse;
                if (C - c >= W) {
                    store_float(to + c, o);
                } else {
                    Element tail[W];
                    store_float(tail, o);
                    memcpy(to + c, tail, sizeof(Element) * (C - c));
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
    while (p * BLOCK < most && p < a.P && x[p] == y[p]) p++;
    const int64_t tokens = p * BLOCK < most ? p * BLOCK : most;
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

// A row with few queries is one item (a tile of all KV heads lies together in the pool), split by heads where there are
// fewer rows than threads can share; a row with many is split by KV head and into tiles of queries.
void attend_all(const Call& a, int threads) {
    const int G = a.H / a.K, few = 4, tile = std::max(QUERY_ROWS / G, few), width = whole(a.C);
    int64_t work = 0;  // KV tokens read, weighted by the queries that read them
    for (int64_t r = 0; r < a.R; r++) work += int64_t(a.start[r + 1] - a.start[r]) * a.length[r];
    if (work * a.H * a.C < 1 << 18) threads = 1;
    int64_t queries = 0, short_rows = 0;
    for (int64_t r = 0; r < a.R; r++) {
        const int n = a.start[r + 1] - a.start[r];
        if (n <= few) queries += n, short_rows++;
    }
    int parts = 1;  // that the KV heads of a short row fall into
    while (threads > 1 && short_rows * parts < 4 * threads && parts < a.K) parts++;
    const auto heads = [&](int n) { return n <= few ? (a.K + parts - 1) / parts : 1; };

    std::vector<int> members(a.R);
    std::vector<Group> groups(a.R);
    std::vector<State> states(a.R, State{nullptr, nullptr});
    std::vector<int64_t> shared(a.R, 0);
    const int found = a.window > 0 ? 0 : find_groups(a, few, members.data(), groups.data());
    if (found) {
        static thread_local Scratch scratch;
        const size_t each_run = line(sizeof(Running) * queries * a.H);
        char* memory = scratch.reserve(each_run + line(sizeof(float) * queries * a.H * width));
        int64_t at = 0;
        for (int i = 0; i < found; i++)
            for (int j = 0; j < groups[i].count; j++) {
                const int r = groups[i].members[j];
                states[r] = {(Running*)memory + at, (float*)(memory + each_run) + at * width};
                shared[r] = groups[i].tokens;
                at += int64_t(a.start[r + 1] - a.start[r]) * a.H;
            }
        fn::each(int64_t(found) * a.K, threads, [&](int64_t i) {
            attend_shared(a, groups[i / a.K], int(i % a.K), states.data());
        });
    }

    std::vector<Item> items;
    for (int pass = 0; pass < 2; pass++)  // long rows first, so that no thread ends with a large item
        for (int r = 0; r < a.R; r++) {
            const int from = a.start[r], to = a.start[r + 1], n = to - from;
            if (n == 0 || (n > few) != (pass == 0)) continue;
            for (int i = (n - 1) / tile * tile; i >= 0; i -= tile)  // later queries see more
                for (int h = 0; h < a.K; h += heads(n))
                    items.push_back({r, from + i, from + (i + tile < n ? i + tile : n), h, std::min(h + heads(n), a.K),
                                     states[r].run ? shared[r] : first_tile(a, r, from + i),
                                     states[r].run ? &states[r] : nullptr});
        }
    const int64_t total = int64_t(items.size());
    each(total, threads, [&](int64_t i) {  // the next item of this thread is most likely i + threads
        attend(a, items[i], i + threads < total ? &items[i + threads] : nullptr);
    });
}

}  // namespace
}  // namespace fn

// All of the library's element type. q_stride in elements, heads and channels of q contiguous; sink: [H] or null; scale
// and cap as the bits of doubles, cap 0 for none.
// Returns 0, or 1 when a row or block lies outside of its array or a length is too small (nothing is computed then).
extern "C" int fn_paged_attention(const void* q, const void* k, const void* v, const void* sink, void* out,
                                  const int32_t* table, const int32_t* row, const int32_t* start, const int32_t* length, int64_t q_stride,
                                  int64_t R, int64_t M, int64_t P, int64_t N, int64_t H, int64_t K, int64_t C,
                                  int64_t scale_bits, int64_t window, int64_t cap_bits, int threads) {
    using namespace fn;
    double scale, cap;
    memcpy(&scale, &scale_bits, sizeof scale);
    memcpy(&cap, &cap_bits, sizeof cap);
    for (int64_t r = 0; r < R; r++) {
        const int64_t n = start[r + 1] - start[r];
        if (n == 0) continue;
        if (n < 0 || row[r] < 0 || row[r] >= M || length[r] < n) return 1;
        const int64_t first = length[r] - n - window + 1;
        for (int64_t p = window > 0 && first > 0 ? first / TILE * BLOCKS : 0; p * BLOCK < length[r] && p < P; p++) {
            const int32_t block = table[row[r] * P + p];
            if (block < 0 || block >= N) return 1;
        }
    }
    const Call a{static_cast<const Element*>(q), static_cast<const Code*>(k), static_cast<const Code*>(v),
                 static_cast<const Element*>(sink), static_cast<Element*>(out), table, row, start, length, q_stride, R, P, N, int(H), int(K), int(C),
                 int(window), float(scale), float(cap)};
    attend_all(a, threads);
    return 0;
}
