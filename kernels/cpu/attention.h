// Causal attention of a pass's rows to the positions of their requests, whose keys and values lie in blocks.
//
// The query rows of a request that share a key head (its heads, of its tokens) are the lanes of vectors, so that scores,
// their maxima and exponentials are taken W rows at a time; weighted sums of values have the head's width as lanes. The
// positions are taken CHUNK at a time with running maxima ("online softmax": Milakov & Gimelshein 2018, arXiv:1805.02867),
// and of every SPLIT positions the results are merged in order ("flash decoding"): then one long request can be shared by
// threads, and a row's bits depend neither on what else is there nor on who computed what.

#include "products.h"

#define CHUNK 64
#define SPLIT 1024
#define TILES 8  // of W rows, that share keys and values on their way through the cache

// Also in weights.py.
typedef struct {
    int32_t row, rows;  // in the pass
    int32_t start, block;  // the first row's position; where the request's blocks begin in the list
} Segment;

typedef struct {
    void *keys, *values;
    float *key_scales, *value_scales;
} Cache;

typedef struct {
    long kind, block_size, heads, kv_heads, width;
    const int32_t* blocks;
} Layout;

typedef struct {
    float *keys, *values;  // [CHUNK][width], padded to NR
    float *queries;  // [TILES][width][W]
    float *weights;  // [CHUNK][W]
    float *part;  // of a split, as below
} Scratch;

// What is known of TILES * W rows after some positions: maxima [TILES * W], sums of weights, weighted values [..][width].
INLINE long padded_width(const Layout* l) { return padded(l->width, NR); }
INLINE long part_floats(const Layout* l) { return TILES * W * (2 + padded_width(l)); }
INLINE long scratch_floats(const Layout* l) {
    return 2 * CHUNK * padded_width(l) + TILES * l->width * W + CHUNK * W + part_floats(l);
}
static Scratch scratch_in(const Layout* l, float* at) {
    long width = padded_width(l);
    Scratch s = {.keys = at, .values = at + CHUNK * width};
    s.queries = s.values + CHUNK * width;
    s.weights = s.queries + TILES * l->width * W;
    s.part = s.weights + CHUNK * W;
    return s;
}

INLINE long slot_of(const Layout* l, const Segment* s, long position) {
    return (long)l->blocks[s->block + position / l->block_size] * l->block_size + position % l->block_size;
}

// A row's key and value heads to their slot.
static void keep(const Layout* l, const Cache* cache, long slot, const float* k, const float* v) {
    long size = l->width * SIZE[l->kind];
    for (long n = 0; n < l->kv_heads; n++, k += l->width, v += l->width) {
        long at = slot * l->kv_heads + n;
        void *to_k = (char*)cache->keys + at * size, *to_v = (char*)cache->values + at * size;
        if (l->kind < I8) {
            from_floats(l->kind, k, to_k, l->width);
            from_floats(l->kind, v, to_v, l->width);
        } else {
            cache->key_scales[at] = quantize(l->kind, k, to_k, l->width);
            cache->value_scales[at] = quantize(l->kind, v, to_v, l->width);
        }
    }
}

static void fetch(const Layout* l, const Cache* cache, const Segment* s, long head, long low, long count, Scratch* to) {
    long size = l->width * SIZE[l->kind], width = padded_width(l);
    for (long i = 0; i < count; i++) {
        long at = slot_of(l, s, low + i) * l->kv_heads + head;
        float k_scale = cache->key_scales ? cache->key_scales[at] : 1, v_scale = cache->value_scales ? cache->value_scales[at] : 1;
        to_floats(l->kind, (char*)cache->keys + at * size, to->keys + i * width, l->width, k_scale);
        to_floats(l->kind, (char*)cache->values + at * size, to->values + i * width, l->width, v_scale);
    }
}

// W rows over `count` positions from `low` on. Row `lane` is of position first + (row0 + lane) / group.
static void attend_chunk(
    const Layout* l, const Scratch* s, const float* queries, long start, long row, long rows, long low, long count,
    float* maximum, float* sum, float* out
) {
    long group = l->heads / l->kv_heads, width = padded_width(l);
    if (low > start + (row + rows - 1) / group) return;
    for (long done = 0; done < count;) {
        long m = at_most(MOST_ROWS, count - done);
        narrow_sums[m - 1](s->keys + done * width, width, 1, (const char*)queries, 4 * W, l->width, s->weights + done * W, W);
        done += m;
    }
    if (low + count - 1 > start + row / group) {  // some row must not see some position
        vi last;
        for (long lane = 0; lane < W; lane++) last[lane] = (int32_t)(start + (row + lane) / group);
        for (long i = 0; i < count; i++) {
            vi hidden = ((vi){} + (int32_t)(low + i)) > last;
            store(s->weights + i * W, where(hidden, splat(-INFINITY), load(s->weights + i * W)));
        }
    }
    vf before = load(maximum), top = before;
    for (long i = 0; i < count; i++) top = larger(load(s->weights + i * W), top);
    vf from = where(top == splat(-INFINITY), (vf){}, top);
    vf total = (vf){};
    for (long i = 0; i < count; i++) {
        vf p = exp_of(load(s->weights + i * W) - from);
        store(s->weights + i * W, p);
        total += p;
    }
    float shrink[W];
    store(shrink, exp_of(before - from));
    store(sum, load(sum) * load(shrink) + total);
    store(maximum, top);
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < width; c += W) store(out + i * width + c, load(out + i * width + c) * shrink[i]);
    for (long c = 0; c < width; c += NR)
        for (long done = 0; done < rows;) {
            long m = at_most(MOST_ROWS, rows - done);
            more_sums[m - 1](s->weights + done, 1, W, (const char*)(s->values + c), 4 * width, count, out + done * width + c, width);
            done += m;
        }
}

// Rows [row, row + rows) of those that share key head `head`, over the positions of one split -> part.
static void attend_split(
    const Layout* l, const Cache* cache, const Segment* s, Scratch* scratch, long head, long row, long rows, long split,
    float* part
) {
    long group = l->heads / l->kv_heads, width = padded_width(l), all = TILES * W;
    long end = at_most((split + 1) * SPLIT, s->start + (row + rows - 1) / group + 1);
    for (long i = 0; i < all; i++) part[i] = -INFINITY;
    memset(part + all, 0, 4 * (all + rows * width));
    for (long low = split * SPLIT; low < end; low += CHUNK) {
        long count = at_most(CHUNK, end - low);
        fetch(l, cache, s, head, low, count, scratch);
        for (long done = 0; done < rows; done += W) {
            float* queries = scratch->queries + done * l->width;
            attend_chunk(l, scratch, queries, s->start, row + done, at_most(W, rows - done), low, count, part + done,
                         part + all + done, part + 2 * all + done * width);
        }
    }
}

// What is known after two runs of positions, the later into the earlier.
static void merge(const Layout* l, float* into, const float* part, long rows) {
    long width = padded_width(l), all = TILES * W;
    for (long done = 0; done < rows; done += W) {
        vf a = load(into + done), b = load(part + done), top = larger(b, a);
        vf from = where(top == splat(-INFINITY), (vf){}, top);
        float keep_a[W], keep_b[W];
        store(keep_a, exp_of(a - from));
        store(keep_b, exp_of(b - from));
        store(into + done, top);
        store(into + all + done, load(into + all + done) * load(keep_a) + load(part + all + done) * load(keep_b));
        for (long i = done; i < at_most(done + W, rows); i++)
            for (long c = 0; c < width; c += W) {
                float* to = into + 2 * all + i * width + c;
                store(to, load(to) * keep_a[i - done] + load(part + 2 * all + i * width + c) * keep_b[i - done]);
            }
    }
}

// The queries of rows [row, row + rows) as columns, scaled. q: [T][q_row] of the pass.
static void set_queries(const Layout* l, const Segment* s, Scratch* to, const float* q, long q_row, long head, long row, long rows) {
    long group = l->heads / l->kv_heads;
    float scale = 1 / sqrtf(l->width);
    for (long i = 0; i < padded(rows, W); i++) {
        long r = row + at_most(i, rows - 1);  // lanes without a row compute the last one's
        const float* from = q + (s->row + r / group) * q_row + (head * group + r % group) * l->width;
        float* column = to->queries + i / W * W * l->width + i % W;
        for (long c = 0; c < l->width; c++) column[c * W] = from[c] * scale;
    }
}

// Weighted values over sums of weights, to rows of the inputs of the next product.
static void put_attended(const Layout* l, const Segment* s, const float* part, long head, long row, long rows, char* to, long to_row, int kind) {
    long group = l->heads / l->kv_heads, width = padded_width(l), all = TILES * W;
    float y[width];
    for (long i = 0; i < rows; i++) {
        long r = row + i;
        float whole = 1 / part[all + i];
        for (long c = 0; c < width; c += W) store(y + c, load(part + 2 * all + i * width + c) * whole);
        long at = (head * group + r % group) * l->width;
        from_floats(kind, y, to + (s->row + r / group) * to_row + at * SIZE[kind], l->width);
    }
}
