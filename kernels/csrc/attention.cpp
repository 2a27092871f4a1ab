// Attention over the paged pool, for any mixture of prefill and decode, with one order of arithmetic for both.
//
// KV is walked in tiles of TILE tokens and in parts of PART tokens, which begin at multiples of TILE and PART in the
// sequence, whoever asks. For each (query, head):
//
//     score[j]  = q . k[j]                       summed over channels from 0 up, in one lane
//     m, l, o   = of a part: online softmax over its tiles, in order; within a tile over tokens from 0 up
//     M, L, O   = those of the parts, merged in order of position; a sink, a logit without a value, comes last
//
// A lane holds one token (scores) or one channel (output), never a piece of a sum, so how many queries are done
// together, who does them and what else is in the batch cannot change a bit. Nor can it that several threads read the
// parts of one row: a part begins with nothing wherever it is read, and is merged the same. Tokens that a query does not
// see get the weight 0, and adding 0 * v leaves a sum as it was; a part of which it sees nothing is not merged.
//
// Rows that begin with the same blocks (a shared prefix) read the tiles of these blocks once: all their queries go over
// them together, which leaves the sums of each as they would have been after those tiles, and every row goes on alone.
//
// K and V are multiplied where they lie (`pool.h`): nothing is transposed or packed.
//
// Where a token's values are its keys (latent attention: one KV head for all query heads), there is no pool of V: a tile
// of keys is turned into values once for all queries of an item, into scratch memory, and then multiplied like any other.
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
// KV tokens, whole tiles, that are summed by themselves. Shorter parts would serve more threads sooner, but merging is
// extra work: with 512 a prefill of 512 tokens at 4096 took 0 to 2% longer (the noise), with one query of 8 heads of 128
// a part takes 15 us.
constexpr int PART = 512;
constexpr int FEW = 4;          // most queries of a short row
constexpr int64_t PARTIALS = 512 << 10;  // bytes a thread of sums of parts that wait to be merged (`memory.py` counts them)
static_assert(PART % TILE == 0, "a tile lies in one part");

// ---- one piece of work ----------------------------------------------------------------------------------------------

struct Call {
    const Element* q;
    const Code *k, *v;    // v: null where values are keys
    const Element* sink;  // one a query head, or null
    Element* out;
    const int32_t *table, *row, *start, *length;
    int64_t q_stride, R, P, N;
    int H, K, C, window;
    float scale, cap;
};

struct Sums {  // of (query, head) pairs
    Running* run;
    float* out;  // whole vectors of channels
};

struct State {  // of the queries of a row that has read tokens it shares: (KV head, query, head of the group)
    Sums whole, part;  // parts that were merged, if one was; the one that goes on, if one does
};

struct Group {  // short rows members[0 .. count) that share their first `tokens` tokens, whole tiles
    const int* members;
    int count;
    int64_t tokens;
};

// Queries that go over tokens [begin, end) together, with KV heads [head, head_end): [from, to) of batch row r, or all
// those of a group, whose first row is r. Their sums lie in rows numbered (KV head, query, head of the group).
struct Item {
    int r, from, to, head, head_end;
    int64_t begin, end;
    int n;             // queries
    int64_t position;  // of the first; those of a group stand at `end` or behind it, which is all that matters
    const Group* group;
    const State* state;  // where the row's stand at `begin`, or null: nothing was read
};
// First token that a query at a position sees: with a window the last `window`, with -window those of its own chunk.
FN_INLINE int64_t first_seen(const Call& a, int64_t position) {
    if (a.window < 0) return position / -a.window * -a.window;
    return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

// First token of the first tile that some query of the item sees.
FN_INLINE int64_t first_tile(const Call& a, int r, int from) {
    return first_seen(a, a.length[r] - (a.start[r + 1] - from)) / TILE * TILE;
}

// Where the tile of token t ends.
FN_INLINE int64_t tile_end(int64_t t) { return t / TILE * TILE + TILE; }

// The rest of the tile of token t, which begins a block, of batch row r with tokens up to `end`; columns beyond the
// table, where only padding goes, are its last.
FN_INLINE Tile place(const Call& a, int r, int head, int64_t t, int64_t end) {
    Tile tile;
    tile.count = int((end < tile_end(t) ? end : tile_end(t)) - t);
    const Layout pool{a.K, a.C};
    const int32_t* table = a.table + int64_t(a.row[r]) * a.P;
    for (int p = 0; p < tile.blocks(); p++) {
        const int64_t column = t / BLOCK + p, block = table[column < a.P ? column : a.P - 1];
        tile.k[p] = a.k + pool.k(block, head);
        tile.v[p] = a.v ? a.v + pool.v(block, head) : nullptr;
    }
    return tile;
}

FN_INLINE Ahead coming(const Tile& tile, int C) {
    Ahead ahead;
    for (int p = 0; p < tile.blocks(); p++) ahead.add(tile.k[p], HEAD + BLOCK * C * sizeof(Code));
    for (int p = 0; p < tile.blocks(); p++)
        if (tile.v[p]) ahead.add(tile.v[p], HEAD + BLOCK * C * sizeof(Code));
    return ahead;
}

// Gives a tile without values those that are its keys, in memory that the thread's next tile takes.
void share(Tile& tile, int C) {
    if constexpr (!ROUNDED) {
        static thread_local Scratch scratch;
        auto* to = (Code*)scratch.reserve(sizeof(Code) * TILE * C);
        for (int p = 0; p < tile.blocks(); p++, to += BLOCK * C) keys_as_values(tile.k[p], C, to), tile.v[p] = to;
    }
}

struct Rows {  // of (query, head) pairs
    uint32_t *query, *weight, *odd;
    float *score, *factor, *query_unit, *weight_unit;  // units: of integers, where KV is rounded
    Sums part, whole;
};

FN_INLINE int whole(int channels) { return (channels + W - 1) / W * W; }
FN_INLINE int atoms_of(int channels) { return (channels + PER - 1) / PER; }
FN_INLINE int pairs_of(const Call& a, const Item& it) { return it.n * (a.H / a.K) * (it.head_end - it.head); }

Rows lay_out(int pairs, int C) {
    static thread_local Scratch scratch;
    const size_t n = pairs, run = sizeof(Running) * n, out = n * whole(C) * 4;
    const size_t sizes[] = {n * atoms_of(C) * 4, n * TILE * 4, size_t(C) * 4, n * TILE * 4, n * 4, n * 4, n * 4,
                            run, out, run, out};
    constexpr int count = sizeof sizes / sizeof *sizes;
    char* at[count];
    size_t sum = 0;
    for (size_t size : sizes) sum += line(size) + 64;
    char* p = scratch.reserve(sum);
    for (int i = 0; i < count; i++) at[i] = p, p += line(sizes[i]) + 64;  // + 64 staggers the buffers over cache sets
    return {(uint32_t*)at[0], (uint32_t*)at[1], (uint32_t*)at[2], (float*)at[3], (float*)at[4], (float*)at[5],
            (float*)at[6], {(Running*)at[7], (float*)at[8]}, {(Running*)at[9], (float*)at[10]}};
}

// The queries [from, to) with one KV head, as rows m and up of scratch: (query, head of the group).
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
        }
}

struct Span {  // [first, last): the tokens of a tile that a query sees
    int first, last;
};

// Rows [m, m + rows) of scratch go over a tile of a part; row i sees the tokens seen(i) of it.
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
                          s.part.run[m + i], unit[i]);
    }
    multiply(weight, TILE / PER, Values(tile, C, s.odd), s.part.out + m * whole(C), whole(C), rows, C, Scales{factor, unit},
             ahead);
}

// Queries are in order, so those of an item that see some of tokens [t, end) are a range of them.
FN_INLINE Span seeing(const Call& a, const Item& it, int64_t t, int64_t end) {
    // The first query whose window or chunk begins at `end` or behind it.
    const int64_t chunk = -a.window, at = a.window < 0 ? (end + chunk - 1) / chunk * chunk : end - 1 + a.window;
    const int64_t passed = at - it.position;
    return {t > it.position ? int(t - it.position) : 0, a.window != 0 && passed < it.n ? int(passed) : it.n};
}

// An item's queries go over tokens [from, to) of one part; then `next` is to be read, from token `ahead` on, if not null.
// Blocks before the first that one of the queries sees are left out: they may be others' by now, and a weight of 0 does
// not silence a NaN. What is left out of a tile would have added 0 to every sum.
void read(const Call& a, const Item& it, const Rows& s, int64_t from, int64_t to, const Item* next, int64_t ahead) {
    const int G = a.H / a.K, rows = it.n * G, heads = it.head_end - it.head;
    const int64_t low = a.window != 0 ? first_seen(a, it.position) / BLOCK * BLOCK : 0;
    for (int64_t t = from < low ? low : from, behind; t < to; t = behind) {
        behind = tile_end(t);
        const Span queries = seeing(a, it, t, behind);
        for (int h = 0; h < heads; h++) {
            Tile tile = place(a, it.r, it.head + h, t, it.end);
            if (!a.v) share(tile, a.C);
            Tile after = tile;
            after.count = 0;
            if (h + 1 < heads)
                after = place(a, it.r, it.head + h + 1, t, it.end);
            else if (behind < to)
                after = place(a, it.r, it.head, behind, it.end);
            else if (next)
                after = place(a, next->r, next->head, ahead, next->end);
            const auto seen = [&](int i) {
                const int64_t at = it.position + queries.first + i / G, first = first_seen(a, at);
                return Span{first > t ? int(first - t) : 0,
                            at + 1 - t < tile.count ? int(at + 1 - t) : tile.count};
            };
            read_tile(a, tile, s, h * rows + queries.first * G, (queries.last - queries.first) * G, seen, coming(after, a.C));
        }
    }
}

void clear(Sums to, int pairs, int width) {
    for (int i = 0; i < pairs; i++) to.run[i] = {NONE, vf{}};
    memset(to.out, 0, sizeof(float) * pairs * width);
}

void copy(Sums to, int i, Sums from, int j, int pairs, int width) {
    memcpy(to.run + i, from.run + j, sizeof(Running) * pairs);
    memcpy(to.out + i * width, from.out + j * width, sizeof(float) * pairs * width);
}

// Merges a part, of which tokens [t, end) were read, into `sums` for the queries that see some of it, and clears it.
void merge(const Call& a, const Item& it, int64_t t, int64_t end, Sums part, Sums sums) {
    const int G = a.H / a.K, width = whole(a.C);
    const Span queries = seeing(a, it, t, end);
    for (int h = 0; h < it.head_end - it.head; h++)
        for (int i = (h * it.n + queries.first) * G; i < (h * it.n + queries.last) * G; i++) {
            Running &x = sums.run[i], &y = part.run[i];
            float *to = sums.out + i * width, *from = part.out + i * width;
            if (x.peak == NONE) {  // into nothing: what `attend` does without looking at it
                copy(sums, i, part, i, 1, width);
                clear({&y, from}, 1, width);
                continue;
            }
            const float peak = x.peak > y.peak ? x.peak : y.peak;
            vf factors{};
            factors[0] = x.peak - peak, factors[1] = y.peak - peak;
            factors = exp_negative(factors);
            const vf before = splat(factors[0]), now = splat(factors[1]);
            x = {peak, fma(y.total, now, x.total * before)};
            y = {NONE, vf{}};
            for (int c = 0; c < width; c += W) {
                store(to + c, fma(load<vf>(from + c), now, load<vf>(to + c) * before));
                store(from + c, vf{});
            }
        }
}

// ---- an item ----------------------------------------------------------------------------------------------------------

// Where an item's queries stand at its beginning: in parts that were merged, and in one that goes on.
FN_INLINE bool goes_on(const Item& it) { return it.state && it.begin >= PART; }

void begin_whole(const Call& a, const Item& it, Sums to) {
    const int pairs = pairs_of(a, it), width = whole(a.C);
    if (goes_on(it))
        copy(to, 0, it.state->whole, it.head * it.n * (a.H / a.K), pairs, width);
    else
        clear(to, pairs, width);
}

void begin_part(const Call& a, const Item& it, Sums to) {
    const int pairs = pairs_of(a, it), width = whole(a.C);
    if (it.state && it.begin % PART)
        copy(to, 0, it.state->part, it.head * it.n * (a.H / a.K), pairs, width);
    else
        clear(to, pairs, width);
}

void load_all(const Call& a, const Item& it, const Rows& s) {
    const int G = a.H / a.K;
    if (it.group)
        for (int i = 0, m = 0; i < it.group->count; i++) {
            const int from = a.start[it.group->members[i]], to = a.start[it.group->members[i] + 1];
            load_queries(a, from, to, it.head, s, m);
            m += (to - from) * G;
        }
    else
        for (int h = it.head; h < it.head_end; h++) load_queries(a, it.from, it.to, h, s, (h - it.head) * it.n * G);
}

// What is done with an item's sums once it has read everything: outputs of a row, states of the rows of a group.
void leave(const Call& a, const Item& it, Sums sums, Sums part, State* states) {
    const int G = a.H / a.K, C = a.C, width = whole(C), pairs = pairs_of(a, it);
    if (it.group) {
        for (int i = 0, m = 0; i < it.group->count; i++) {
            const int r = it.group->members[i], n = (a.start[r + 1] - a.start[r]) * G;
            if (it.end >= PART) copy(states[r].whole, it.head * n, sums, m, n, width);
            if (it.end % PART) copy(states[r].part, it.head * n, part, m, n, width);
            m += n;
        }
        return;
    }
    for (int i = 0; i < pairs; i++) {
        const int h = it.head + i / (it.n * G), t = it.from + i / G % it.n;
        const float* sum = sums.out + i * width;
        Element* to = a.out + (int64_t(t) * a.H + h * G + i % G) * C;
        float total = sum_lanes(sums.run[i].total), unit = 1;
        if (a.sink) {
            const float sink = load_float_part(a.sink + h * G + i % G, 1)[0], peak = std::max(sums.run[i].peak, sink);
            unit = exp_negative(splat(sums.run[i].peak - peak))[0];
            total = total * unit + exp_negative(splat(sink - peak))[0];
        }
        const vf factor = splat(unit / total);
        for (int c = 0; c < C; c += W) {
            const vf o = load<vf>(sum + c) * factor;
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

// Where the part of token t ends, or the item.
FN_INLINE int64_t part_end(const Item& it, int64_t t) { return std::min(it.end, t / PART * PART + PART); }

// Whether a part that was read up to `end` is done with: that of a group goes on in its rows.
FN_INLINE bool merges(const Item& it, int64_t end) { return !it.group || end % PART == 0; }

// A whole item; `next` is what this thread will most likely do next, or null.
void attend(const Call& a, const Item& it, State* states, const Item* next) {
    const int pairs = pairs_of(a, it), width = whole(a.C);
    Rows s = lay_out(pairs, a.C);
    load_all(a, it, s);
    begin_part(a, it, s.part);
    bool none = !goes_on(it);  // is merged
    if (!none) begin_whole(a, it, s.whole);
    for (int64_t t = it.begin, end; t < it.end; t = end) {
        end = part_end(it, t);
        if (end < it.end)
            read(a, it, s, t, end, &it, end);
        else
            read(a, it, s, t, end, next, next ? next->begin : 0);
        if (!merges(it, end)) break;
        const Span queries = seeing(a, it, t, end);
        if (none && queries.last - queries.first == it.n) {  // a first part is taken as it is: rows of one part pay nothing
            std::swap(s.whole, s.part);
            if (end < it.end) clear(s.part, pairs, width);
        } else {
            if (none) clear(s.whole, pairs, width);
            merge(a, it, t, end, s.part, s.whole);
        }
        none = false;
    }
    leave(a, it, s.whole, s.part, states);
}

// ---- items that are divided over KV -----------------------------------------------------------------------------------

struct Unit {  // tokens [begin, end) of an item, in one part
    int item;
    int64_t begin, end;
};

// Where sums of `pairs` lie in `memory`, if each of them takes `bytes`.
FN_INLINE Sums sums_at(char* memory, size_t bytes, int64_t i, int pairs) {
    char* at = memory + bytes * i;
    return {(Running*)at, (float*)(at + line(sizeof(Running) * pairs))};
}

// The same as `attend` for every item, a unit of work being one part of one. A round leaves the sums of as many parts as
// there is room for; then those of each item are merged, in order. Returns false, having done nothing, where it would not
// help or room for two units a thread and one merged sum an item would be more than PARTIALS a thread.
bool attend_parts(const Call& a, const std::vector<Item>& items, int threads, State* states) {
    std::vector<Unit> units;
    int most = 0;
    for (size_t i = 0; i < items.size(); i++) {
        most = std::max(most, pairs_of(a, items[i]));
        for (int64_t t = items[i].begin, end; t < items[i].end; t = end)
            end = part_end(items[i], t), units.push_back({int(i), t, end});
    }
    const size_t bytes = line(sizeof(Running) * most) + line(sizeof(float) * most * whole(a.C));
    const int64_t count = units.size(), slots = threads * PARTIALS / int64_t(bytes);
    const int64_t round = std::min(count, slots - int64_t(items.size()));
    if (units.size() == items.size() || round < std::min(count, int64_t(2 * threads))) return false;
    static thread_local Scratch scratch;
    char* memory = scratch.reserve(bytes * (items.size() + round));
    const auto whole_of = [&](int i) { return sums_at(memory, bytes, i, most); };

    for (int64_t first = 0; first < count; first += round) {
        const int64_t last = std::min(count, first + round);
        const auto part_of = [&](int64_t u) { return sums_at(memory, bytes, items.size() + u - first, most); };
        each(last - first, threads, [&](int64_t i) {
            const Unit& u = units[first + i];
            const Item& it = items[u.item];
            Rows s = lay_out(pairs_of(a, it), a.C);
            s.part = part_of(first + i);
            load_all(a, it, s);
            if (u.begin == it.begin)
                begin_part(a, it, s.part);
            else
                clear(s.part, pairs_of(a, it), whole(a.C));
            const Unit* next = first + i + threads < last ? &units[first + i + threads] : nullptr;
            read(a, it, s, u.begin, u.end, next ? &items[next->item] : nullptr, next ? next->begin : 0);
        });
        const int from = units[first].item, to = units[last - 1].item + 1;
        each(to - from, threads, [&](int64_t i) {
            const int item = from + int(i);
            const Item& it = items[item];
            const auto before = [](const Unit& u, int item) { return u.item < item; };
            int64_t u = std::lower_bound(units.begin() + first, units.begin() + last, item, before) - units.begin();
            for (; u < last && units[u].item == item; u++) {
                if (units[u].begin == it.begin) begin_whole(a, it, whole_of(item));
                if (merges(it, units[u].end)) merge(a, it, units[u].begin, units[u].end, part_of(u), whole_of(item));
                if (units[u].end == it.end) leave(a, it, whole_of(item), part_of(u), states);
            }
        });
    }
    return true;
}

void attend_items(const Call& a, const std::vector<Item>& items, int threads, State* states) {
    const int64_t count = items.size();
    if (threads > 1 && count < threads && attend_parts(a, items, threads, states)) return;
    each(count, threads, [&](int64_t i) {  // the next item of this thread is most likely i + threads
        attend(a, items[i], states, i + threads < count ? &items[i + threads] : nullptr);
    });
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
int find_groups(const Call& a, int* members, Group* groups) {
    int count = 0, found = 0;
    for (int r = 0; r < a.R; r++) {
        const int n = a.start[r + 1] - a.start[r];
        if (n > 0 && n <= FEW && a.length[r] - n >= TILE) members[count++] = r;
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
// fewer rows than threads can share; a row with many is split by KV head and into tiles of queries. Where that leaves
// fewer items than threads, they are divided over KV.
void attend_all(const Call& a, int threads) {
    const int G = a.H / a.K, tile = std::max(QUERY_ROWS / G, FEW), width = whole(a.C);
    int64_t work = 0;  // KV tokens read, weighted by the queries that read them
    for (int64_t r = 0; r < a.R; r++) work += int64_t(a.start[r + 1] - a.start[r]) * a.length[r];
    if (work * a.H * a.C < 1 << 18) threads = 1;
    int64_t queries = 0, short_rows = 0;
    for (int64_t r = 0; r < a.R; r++) {
        const int n = a.start[r + 1] - a.start[r];
        if (n <= FEW) queries += n, short_rows++;
    }
    int pieces = 1;  // that the KV heads of a short row fall into
    while (threads > 1 && short_rows * pieces < 4 * threads && pieces < a.K) pieces++;
    const auto heads = [&](int n) { return n <= FEW ? (a.K + pieces - 1) / pieces : 1; };

    std::vector<int> members(a.R);
    std::vector<Group> groups(a.R);
    std::vector<State> states(a.R, State{});
    std::vector<int64_t> shared(a.R, 0);
    std::vector<Item> items;
    const int found = a.window != 0 ? 0 : find_groups(a, members.data(), groups.data());
    if (found) {
        static thread_local Scratch scratch;
        const size_t each_run = line(sizeof(Running) * queries * a.H), each_out = line(sizeof(float) * queries * a.H * width);
        char* memory = scratch.reserve(2 * (each_run + each_out));
        const Sums all = {(Running*)memory, (float*)(memory + 2 * each_run)};
        const int64_t second = each_run / sizeof(Running), second_out = each_out / sizeof(float);
        int64_t at = 0;
        for (int i = 0; i < found; i++) {
            const Group& g = groups[i];
            int n = 0;
            for (int j = 0; j < g.count; j++) {
                const int r = g.members[j], own = a.start[r + 1] - a.start[r];
                states[r] = {{all.run + at, all.out + at * width}, {all.run + second + at, all.out + second_out + at * width}};
                shared[r] = g.tokens;
                at += int64_t(own) * a.H;
                n += own;
            }
            for (int h = 0; h < a.K; h++)
                items.push_back({g.members[0], 0, 0, h, h + 1, 0, g.tokens, n, g.tokens, &g, nullptr});
        }
        attend_items(a, items, threads, states.data());
        items.clear();
    }

    for (int pass = 0; pass < 2; pass++)  // long rows first, so that no thread ends with a large item
        for (int r = 0; r < a.R; r++) {
            const int first = a.start[r], n = a.start[r + 1] - first;
            if (n == 0 || (n > FEW) != (pass == 0)) continue;
            const bool shares = shared[r] > 0;
            for (int i = (n - 1) / tile * tile; i >= 0; i -= tile) {  // later queries see more
                const int from = first + i, to = first + std::min(i + tile, n);
                const int64_t position = a.length[r] - n + i;
                for (int h = 0; h < a.K; h += heads(n))
                    items.push_back({r, from, to, h, std::min(h + heads(n), a.K),
                                     shares ? shared[r] : first_tile(a, r, from), position + to - from, to - from,
                                     position, nullptr, shares ? &states[r] : nullptr});
            }
        }
    attend_items(a, items, threads, states.data());
}

}  // namespace
}  // namespace fn

// All of the library's element type. v: null where values are keys, which those of 8 bits cannot be. q_stride in elements, heads and channels of q contiguous; sink: [H] or null; scale
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
    if (ROUNDED && !v) return 1;
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
